#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace py = pybind11;
using namespace mtlgrad;

namespace {

using Ptr = std::uintptr_t;

template <typename T>
T* as(Ptr p) {
  return reinterpret_cast<T*>(p);
}

DType dtype_of(int code) {
  if (code < 0 || code > 3) throw std::invalid_argument("unknown dtype code " + std::to_string(code));
  return static_cast<DType>(code);
}

// Python's side of Sink: two pointers and a flag that says which two, then the powers.
Sink sink_of(bool fold, Ptr first, Ptr second, Ptr power) {
  if (fold) return {nullptr, nullptr, as<void>(first), as<void>(second), as<const double>(power)};
  return {as<void>(first), as<void>(second), nullptr, nullptr, nullptr};
}

// The kernels of the `moments` stem on one device; every one takes its Place as (threads, stream, device).
struct MomentsKernels {
  decltype(&cpu::regression_moments) regression_moments;
  decltype(&cpu::binary_moments) binary_moments;
  decltype(&cpu::multiclass_moments) multiclass_moments;
  decltype(&cpu::sample_residuals) sample_residuals;
  decltype(&cpu::sampled_moments) sampled_moments;
  decltype(&cpu::precision_mean) precision_mean;
  decltype(&cpu::weighted_mean) weighted_mean;
};

void bind_moments(py::module_& m, const MomentsKernels& kernels) {
  m.def("regression_moments",
        [run = kernels.regression_moments](int dtype, Ptr features, int64_t stride, int64_t batch, int64_t width,
                                           Ptr targets, Ptr mean, Ptr cross, int64_t cross_stride, Ptr spread,
                                           int64_t spread_stride, int64_t outputs, bool fold, Ptr first, Ptr second,
                                           Ptr power, int threads, Ptr stream, int index) {
          py::gil_scoped_release nogil;
          run(dtype_of(dtype), {as<void>(features), stride, batch, width}, as<void>(targets), as<void>(mean),
              as<void>(cross), cross_stride, as<void>(spread), spread_stride, outputs,
              sink_of(fold, first, second, power), {threads, as<void>(stream), index});
        });

  m.def("binary_moments",
        [run = kernels.binary_moments](int dtype, Ptr features, int64_t stride, int64_t batch, int64_t width,
                                       Ptr targets, Ptr mean, Ptr cross, Ptr spread, Ptr nodes, Ptr weights,
                                       int64_t num_nodes, int64_t outputs, bool fold, Ptr first, Ptr second, Ptr power,
                                       int threads, Ptr stream, int index) {
          py::gil_scoped_release nogil;
          run(dtype_of(dtype), {as<void>(features), stride, batch, width}, as<void>(targets), as<void>(mean),
              as<void>(cross), as<void>(spread), as<void>(nodes), as<void>(weights), num_nodes, outputs,
              sink_of(fold, first, second, power), {threads, as<void>(stream), index});
        });

  m.def("multiclass_moments",
        [run = kernels.multiclass_moments](
            int dtype, Ptr features, int64_t stride, int64_t batch, int64_t width, Ptr targets, int structure, Ptr mean,
            Ptr cross, Ptr spread, Ptr classes, int64_t num_classes, Ptr points, int64_t num_points, Ptr workspace,
            int64_t slots, bool fold, Ptr first, Ptr second, Ptr power, int threads, Ptr stream, int index) {
          py::gil_scoped_release nogil;
          const MulticlassPosterior posterior{static_cast<Structure>(structure),
                                              as<void>(mean),
                                              as<void>(cross),
                                              as<void>(spread),
                                              as<void>(classes),
                                              num_classes};
          run(dtype_of(dtype), {as<void>(features), stride, batch, width}, as<const int64_t>(targets), posterior,
              as<const double>(points), num_points, as<double>(workspace), slots, sink_of(fold, first, second, power),
              {threads, as<void>(stream), index});
        });

  m.def("sample_residuals",
        [run = kernels.sample_residuals](int dtype, bool multiclass, Ptr logits, Ptr targets, int64_t batch,
                                         int64_t samples, int64_t classes, int threads, Ptr stream, int index) {
          py::gil_scoped_release nogil;
          run(dtype_of(dtype), static_cast<Likelihood>(multiclass), as<void>(logits), as<void>(targets), batch, samples,
              classes, {threads, as<void>(stream), index});
        });

  m.def("sampled_moments",
        [run = kernels.sampled_moments](int dtype, bool multiclass, Ptr residuals, Ptr samples, int64_t batch,
                                        int64_t num_samples, int64_t classes, int64_t width, bool fold, Ptr first,
                                        Ptr second, Ptr power, int threads, Ptr stream, int index) {
          py::gil_scoped_release nogil;
          run(dtype_of(dtype), static_cast<Likelihood>(multiclass), as<void>(residuals), as<void>(samples), batch,
              num_samples, classes, width, sink_of(fold, first, second, power), {threads, as<void>(stream), index});
        });

  m.def("precision_mean",
        [run = kernels.precision_mean](int dtype, Ptr means, Ptr variances, Ptr power, Ptr out, int64_t batch,
                                       int64_t tasks, int64_t width, int threads, Ptr stream, int index) {
          py::gil_scoped_release nogil;
          run(dtype_of(dtype), as<void>(means), as<void>(variances), as<const double>(power), as<void>(out), batch,
              tasks, width, {threads, as<void>(stream), index});
        });

  m.def("weighted_mean",
        [run = kernels.weighted_mean](int dtype, Ptr numerator, Ptr denominator, Ptr out, int64_t batch, int64_t width,
                                      int threads, Ptr stream, int index) {
          py::gil_scoped_release nogil;
          run(dtype_of(dtype), as<void>(numerator), as<void>(denominator), as<void>(out), batch, width,
              {threads, as<void>(stream), index});
        });
}

// The kernels of the `combine` and `align` stems on one device.
struct CombineKernels {
  decltype(&cpu::gram_workspace) gram_workspace;
  decltype(&cpu::dots_workspace) dots_workspace;
  decltype(&cpu::gram) gram;
  decltype(&cpu::dots) dots;
  decltype(&cpu::combine) combine;
  decltype(&cpu::displace) displace;
  decltype(&cpu::align_workspace) align_workspace;
  decltype(&cpu::align) align;
};

using Pointers = std::vector<Ptr>;
using Sizes = std::vector<int64_t>;

static_assert(sizeof(Ptr) == sizeof(void*), "a table of integers is read as a table of pointers");

Rows rows_of(const Pointers& data, const Sizes& sizes, int64_t tasks) {
  if (data.size() != sizes.size() * static_cast<size_t>(tasks)) throw std::invalid_argument("rows: tables disagree");
  return {reinterpret_cast<const void* const*>(data.data()), sizes.data(), tasks, static_cast<int64_t>(sizes.size())};
}

void bind_combine(py::module_& m, const CombineKernels& kernels) {
  m.def("gram_workspace", kernels.gram_workspace);
  m.def("dots_workspace", kernels.dots_workspace);
  m.def("align_workspace", kernels.align_workspace);

  m.def("gram", [run = kernels.gram](int dtype, const Pointers& data, const Sizes& sizes, int64_t tasks, Ptr out,
                                     Ptr workspace, int threads, Ptr stream, int index) {
    py::gil_scoped_release nogil;
    run(dtype_of(dtype), rows_of(data, sizes, tasks), as<double>(out), as<double>(workspace),
        {threads, as<void>(stream), index});
  });

  m.def("dots",
        [run = kernels.dots](int row_type, int vector_type, const Pointers& data, const Sizes& sizes, int64_t tasks,
                             const Pointers& vector, Ptr out, Ptr workspace, int threads, Ptr stream, int index) {
          py::gil_scoped_release nogil;
          run(dtype_of(row_type), dtype_of(vector_type), rows_of(data, sizes, tasks),
              reinterpret_cast<const void* const*>(vector.data()), as<double>(out), as<double>(workspace),
              {threads, as<void>(stream), index});
        });

  m.def("combine", [run = kernels.combine](int dtype, const Pointers& data, const Sizes& sizes, int64_t tasks,
                                           Ptr weights, const Pointers& out, int threads, Ptr stream, int index) {
    py::gil_scoped_release nogil;
    run(dtype_of(dtype), rows_of(data, sizes, tasks), as<const double>(weights),
        reinterpret_cast<void* const*>(out.data()), {threads, as<void>(stream), index});
  });

  m.def("displace", [run = kernels.displace](int row_type, int base_type, const Pointers& data, const Sizes& sizes,
                                             int64_t tasks, const Pointers& base, Ptr weights, const Pointers& out,
                                             int threads, Ptr stream, int index) {
    py::gil_scoped_release nogil;
    run(dtype_of(row_type), dtype_of(base_type), rows_of(data, sizes, tasks),
        reinterpret_cast<const void* const*>(base.data()), as<const double>(weights),
        reinterpret_cast<void* const*>(out.data()), {threads, as<void>(stream), index});
  });

  m.def("align", [run = kernels.align](Ptr gram, Ptr preference, int scale, double rtol, int64_t tasks, Ptr weights,
                                       Ptr singular_values, Ptr rank, Ptr condition_number, Ptr transform,
                                       Ptr workspace, int threads, Ptr stream, int index) {
    py::gil_scoped_release nogil;
    const Alignment alignment{as<double>(weights), as<double>(singular_values), as<int64_t>(rank),
                              as<double>(condition_number), as<double>(transform)};
    run(as<const double>(gram), as<const double>(preference), static_cast<Scale>(scale), rtol, tasks, alignment,
        as<double>(workspace), {threads, as<void>(stream), index});
  });
}

// The kernels of the `adatask` stem on one device.
struct AdataskKernels {
  decltype(&cpu::adatask_workspace) workspace;
  decltype(&cpu::adatask) step;
};

void* const* table_of(const Pointers& pointers) {
  return pointers.empty() ? nullptr : reinterpret_cast<void* const*>(pointers.data());
}

void bind_adatask(py::module_& m, const AdataskKernels& kernels, int64_t max_tasks) {
  m.attr("adatask_max_tasks") = max_tasks;
  m.def("adatask_workspace", kernels.workspace);

  // numbers: lr, first_decay, second_decay, eps, weight_decay, lr_decay, square_decay; flags: extra, decoupled, maximize,
  // stochastic.
  m.def("adatask",
        [run = kernels.step](int parameter_type, int moment_type, int rule, const std::array<double, 7>& numbers,
                             const std::array<bool, 4>& flags, const std::vector<double>& weights, Ptr lr_tensor,
                             const Sizes& sizes, const Pointers& parameters, const Pointers& gradients,
                             const Pointers& first, const Pointers& second, const Pointers& largest,
                             const Pointers& buffers, const Pointers& steps, const Pointers& squares, const Sizes& keys,
                             Ptr present, Ptr workspace, int threads, Ptr stream, int index) {
          py::gil_scoped_release nogil;
          const size_t tensors = sizes.size(), entries = tensors * weights.size();
          const auto fits = [](const Pointers& table, size_t size) { return table.empty() || table.size() == size; };
          if (parameters.size() != tensors || steps.size() != tensors || keys.size() != tensors ||
              gradients.size() != entries || second.size() != entries || !fits(first, entries) ||
              !fits(largest, entries) || !fits(buffers, tensors) || !fits(squares, tensors))
            throw std::invalid_argument("adatask: tables disagree");
          const TaskMoments table{static_cast<int64_t>(weights.size()),
                                  static_cast<int64_t>(tensors),
                                  sizes.data(),
                                  table_of(parameters),
                                  reinterpret_cast<const void* const*>(gradients.data()),
                                  table_of(first),
                                  table_of(second),
                                  table_of(largest),
                                  table_of(buffers),
                                  reinterpret_cast<const float* const*>(steps.data()),
                                  squares.empty() ? nullptr : reinterpret_cast<double* const*>(squares.data()),
                                  keys.data(),
                                  as<const bool>(present)};
          Adaptive by;
          by.rule = static_cast<Rule>(rule);
          std::tie(by.extra, by.decoupled, by.maximize, by.stochastic) = std::tuple_cat(flags);
          std::tie(by.lr, by.first_decay, by.second_decay, by.eps, by.weight_decay, by.lr_decay, by.square_decay) =
              std::tuple_cat(numbers);
          by.lr_tensor = as<const double>(lr_tensor);
          by.weights = weights.data();
          run(dtype_of(parameter_type), dtype_of(moment_type), table, by, as<double>(workspace),
              {threads, as<void>(stream), index});
        });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "mtlgrad kernels on raw pointers; mtlgrad.ops is the checked tensor API";

#ifdef __clang__
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "g++ " __VERSION__;
#endif
#ifdef _OPENMP
  m.attr("openmp") = _OPENMP;  // the OpenMP standard's date, e.g. 201511
#else
  m.attr("openmp") = 0;
#endif
  m.def("multiclass_workspace", [](int structure, int64_t classes, int64_t points) {
    return multiclass_workspace(static_cast<Structure>(structure), classes, points);
  });
  m.def("condition_on_batch", [](int dtype, Ptr cross, Ptr gram, Ptr curvature, Ptr spread, int64_t rows, int64_t batch,
                                 int64_t width, int threads) {
    py::gil_scoped_release nogil;
    return cpu::condition_on_batch(dtype_of(dtype), as<void>(cross), as<void>(gram), as<void>(curvature),
                                   as<void>(spread), rows, batch, width, {threads, nullptr, 0});
  });
  py::module_ on_cpu = m.def_submodule("cpu");
  bind_moments(on_cpu, {cpu::regression_moments, cpu::binary_moments, cpu::multiclass_moments, cpu::sample_residuals,
                        cpu::sampled_moments, cpu::precision_mean, cpu::weighted_mean});
  bind_combine(on_cpu, {cpu::gram_workspace, cpu::dots_workspace, cpu::gram, cpu::dots, cpu::combine, cpu::displace,
                        cpu::align_workspace, cpu::align});
  bind_adatask(on_cpu, {cpu::adatask_workspace, cpu::adatask}, std::numeric_limits<int64_t>::max());

#ifdef MTLGRAD_WITH_CUDA
  m.attr("cuda_compiled") = true;
  m.attr("cuda_archs") = MTLGRAD_CUDA_ARCHS;
  m.attr("nvcc") = MTLGRAD_NVCC;
  m.def("cuda_device_count", &cuda::device_count);
  m.def("cuda_device_error", &cuda::device_error);
  m.def("cuda_runtime_version", &cuda::runtime_version);
  py::module_ on_cuda = m.def_submodule("cuda");
  bind_moments(on_cuda, {cuda::regression_moments, cuda::binary_moments, cuda::multiclass_moments,
                         cuda::sample_residuals, cuda::sampled_moments, cuda::precision_mean, cuda::weighted_mean});
  bind_combine(on_cuda, {cuda::gram_workspace, cuda::dots_workspace, cuda::gram, cuda::dots, cuda::combine,
                         cuda::displace, cuda::align_workspace, cuda::align});
  bind_adatask(on_cuda, {cuda::adatask_workspace, cuda::adatask}, kMaxStepTasks);
#else
  m.attr("cuda_compiled") = false;
  m.attr("cuda_archs") = "";
  m.attr("nvcc") = "";
#endif
}

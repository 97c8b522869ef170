// The only header that bindings, launchers and kernels share. No torch, no Python, no CUDA types: pointers are raw, the
// stream is an opaque handle, sizes and strides are int64_t and count elements.
//
// B examples, D features, P = D + 1 (bias last), O outputs, C classes, S samples or points, T tasks.
// The kernels of the `moments` stem take float32 and float64: half-precision tensors are converted before they get here.
// Those of `combine` read every type as it is.
#pragma once
#include <cstdint>
#include <string>

namespace mtlgrad {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };

// Where the moments of T tasks go. Either they are written out, mean and variance [B, T, D]; or they are accumulated at
// once, numerator += scale lambda mean and denominator += lambda, [B, D] each, lambda = variance^-power, and no
// [B, T, D] tensor exists.
struct Output {
  void* mean = nullptr;
  void* variance = nullptr;
  void* numerator = nullptr;
  void* denominator = nullptr;
  const double* power = nullptr;  // [T], on the kernel's device
  const double* scale = nullptr;  // [T], likewise
};

// Last-layer features [B, D], rows `stride` apart.
struct Features {
  const void* data;
  int64_t stride, batch, width;
};

// The posterior of O outputs, apart from one another, of W weights each, at the B examples. One covariance may serve all
// outputs: then the strides over these are 0.
struct OutputsPosterior {
  const void* mean;                                              // [O, W]
  const void* cross_covariance;                                  // [O or 1, B, W] = S h
  const void* variances;                                         // [O or 1, W] = diag S
  int64_t covariance_stride, variance_stride, outputs, weights;  // weights: W
};

// How the weights of different classes covary; decides what `cross_covariance` and `variances` hold.
enum class Structure : int { full = 0, block = 1, kron = 2 };

// The multiclass posterior at the B examples.
//   full:  cross_covariance [C, B, C, P]: [k, b, c] = S_ck h~_b;  variances [C, C, P]: [c, k, d] = S_cd,kd
//   block: cross_covariance [C, B, P]: [c, b] = S_c h~_b;         variances [C, P]: [c, d] = S_c,dd
//   kron:  cross_covariance [B, P]: [b] = S_feature h~_b;         variances [P]: [d] = S_feature,dd;
//          classes [C, C] = the class factor (unused otherwise)
struct MulticlassPosterior {
  Structure structure;
  const void* mean;  // [C, P]
  const void *cross_covariance, *variances, *classes;
  int64_t num_classes;
};

enum class Likelihood : int { binary = 0, multiclass = 1 };

// T rows (the gradients of T tasks), each spread over P tensors: row t of tensor p is the sizes[p] elements from
// data[p * tasks + t] on. The two tables are in host memory, what they point at on the kernel's device; a kernel has read
// the tables when it returns. Rows may overlap one another.
struct Rows {
  const void* const* data;
  const int64_t* sizes;
  int64_t tasks, tensors;
};

// What the aligned gradients are scaled to: the smallest, median or root mean square of the singular values kept.
enum class Scale : int { min = 0, median = 1, rmse = 2 };

// Where the alignment of T tasks is written; see align.
struct Alignment {
  double *weights, *singular_values;  // [T], the latter descending
  int64_t* rank;                      // [1]
  double* condition_number;           // [1]
  double* transform;                  // [T, T]
};

// The largest number of tasks that align and the rules take.
constexpr int64_t kMaxAlignTasks = 64;

// The largest number of tasks that a step of AdaTask's optimizers takes on a device; the host takes any.
constexpr int64_t kMaxStepTasks = 64;

// What a step of every optimizer that AdaTask (arXiv 2211.15055) gives moments of each task's own goes by;
// math/adatask.h has the formulas.
struct StepSettings {
  double lr;                // unless lr_tensor
  const double* lr_tensor;  // [1], on the kernel's device, or null
  double eps, weight_decay;
  bool maximize;
  bool stochastic;             // rounding of bfloat16 moments
  double square_decay;         // of the average squared updates
  const double* task_weights;  // [T], in host memory
  const bool* present;         // [T], on the kernel's device: the tasks that take part; null: all
};

struct Adam {
  double beta1, beta2;
  bool decoupled;  // weight decay of the parameter itself, not through the gradient
};

struct RMSprop {
  double alpha, momentum;
};

struct Adagrad {
  double lr_decay;
};

// P parameters and what else there is of each. These tables and the following are in host memory, as those of Rows, and
// of pointers to memory on the kernel's device. Null tables: none.
struct StepTensors {
  void* const* parameters;    // [P]
  const float* const* steps;  // [P], each [T]: the number of this step, from 1
  double* const* squares;     // [P], each [T], or null: the average squared updates
  const int64_t* keys;        // [P], or null: what tells parameters apart in stochastic rounding
};

// Those of parameter p and task t at p * tasks + t.
struct AdamMoments {
  void *const *exp_avgs, *const *exp_avg_sqs;  // [P, T]
  void* const* max_exp_avg_sqs;                // [P, T], or null: not amsgrad
};

struct RMSpropMoments {
  void* const* square_avgs;       // [P, T]
  void* const* grad_avgs;         // [P, T], or null: not centered
  void* const* momentum_buffers;  // [P], or null: no momentum
};

struct AdagradMoments {
  void* const* state_sums;  // [P, T]
};

// Where a kernel runs: the host reads `threads`, a device the other two.
struct Place {
  int threads = 1;
  void* stream = nullptr;
  int device = 0;
};

// float64 elements of one slot of multiclass_moments' workspace.
int64_t multiclass_workspace(Structure, int64_t classes, int64_t points);

namespace cpu {

// targets [B, O] (NaN: no label), a posterior of D weights, or of P, whose h~ has the appended one.
void regression_moments(DType, Features, const void* targets, OutputsPosterior, Output, Place);

// targets [B, O] (NaN: no label), a posterior of P weights, whose h~ has the appended one; nodes and weights [nodes] of a
// rule for u ~ N(0, 1) that is exact for 1, u and u^2.
void binary_moments(DType, Features, const void* targets, OutputsPosterior, const void* nodes, const void* weights,
                    int64_t num_nodes, Output, Place);

// targets [B] (-100: no label), points [S, C] float64 for u ~ N(0, I); workspace of `slots` times
// multiclass_workspace(...) float64: a slot serves one example at a time.
void multiclass_moments(DType, Features, const int64_t* targets, MulticlassPosterior, const double* points,
                        int64_t num_points, double* workspace, int64_t slots, Output, Place);

// Logits to residuals in place: logistic or softmax less the target. Binary: logits [C, B, S], targets [B, C] of the same
// type (NaN: no label). Multiclass: logits [B, S, C], targets int64 [B] (-100: no label). The residuals of an example
// without a label are NaN.
void sample_residuals(DType, Likelihood, void* logits, const void* targets, int64_t batch, int64_t samples,
                      int64_t classes, Place);

// Moments over S samples of r_cbs w_scd (binary, T = C) or sum_c r_bsc w_scd (multiclass, T = 1); residuals as above,
// samples [S, C, P].
void sampled_moments(DType, Likelihood, const void* residuals, const void* samples, int64_t batch, int64_t num_samples,
                     int64_t classes, int64_t width, Output, Place);

// means, variances [B, T, D], power [T] -> out [B, D].
void precision_mean(DType, const void* means, const void* variances, const double* power, void* out, int64_t batch,
                    int64_t tasks, int64_t width, Place);

// numerator / denominator / B, zero where the denominator is.
void weighted_mean(DType, const void* numerator, const void* denominator, void* out, int64_t batch, int64_t width,
                   Place);

// The posterior of a batch from its prior (bayesagg/aggregation.py), for each of `rows` outputs: cross_covariance [R, B, W]
// = H S in and, after, the same of the batch posterior; gram [R, B, B] = H S H', curvature [R, B] > 0, variances [R, W] =
// diag S in and out. False, and then nothing of use in either, if a pivot is not positive. Host only: on a device the batched
// Cholesky of a library does it.
bool condition_on_batch(DType, void* cross_covariance, const void* gram, const void* curvature, void* variances,
                        int64_t rows, int64_t batch, int64_t width, Place);

// The same from the batch posterior's own precision, prior + curvature, [W, W] each, the strides apart from row to row, for
// examples hidden [B, W]: cross_covariance [R, B, W] = H S and variances [R, W] = diag S, S its inverse. Symmetric, float64;
// hidden and results of `dtype`. Host only.
bool condition_by_precision(DType, const double* prior, const double* curvature, const void* hidden,
                            void* cross_covariance, void* variances, int64_t prior_stride, int64_t curvature_stride,
                            int64_t rows, int64_t batch, int64_t width, Place);

// sums [R, W, W] += H' diag(q_r) H, curvature q [R, B] (null: one), hidden [B, W]; float64. Host only.
void add_curvature(const double* hidden, const double* curvature, double* sums, int64_t rows, int64_t batch,
                   int64_t width, Place);

// float64 elements of workspace that gram and dots need for rows of `columns` elements in all.
int64_t gram_workspace(int64_t tasks, int64_t columns);
int64_t dots_workspace(int64_t tasks, int64_t columns);

// out [T, T] += <row i, row j>, products and sums in float64, which no float32 can overflow or underflow; in an order
// that depends on the sizes alone (on a device also on whether rows begin at multiples of 16 bytes).
void gram(DType, Rows, double* out, double* workspace, Place);

// out [T] += <row t, vector>, vector [P] tensors of the rows' sizes; float64 as above. Types: the rows' and the
// vector's, one for both or bfloat16 and float32.
void dots(DType, DType, Rows, const void* const* vector, double* out, double* workspace, Place);

// out[p] = sum_t weights[t] row t of tensor p, summed in float32 (float64 for float64 rows), rounded once; out [P] tensors
// of the rows' type, each apart from all rows or exactly one of them.
void combine(DType, Rows, const double* weights, void* const* out, Place);

// out[p] = base[p] + sum_t weights[t] row t of tensor p, summed in float64 in this order, rounded once. Types: the
// rows', and that of base and out; one for both or bfloat16 and float32. Each tensor of out is apart from all rows, and
// apart from base or exactly base[p].
void add_weighted(DType, DType, Rows, const void* const* base, const double* weights, void* const* out, Place);

// gram, preference [T] (null: ones) -> the alignment: math/align.h has the formulas. T <= kMaxAlignTasks. `workspace` holds
// align_workspace(T) float64. Anything not finite in gram makes every output NaN, and the rank -1.
int64_t align_workspace(int64_t tasks);
void align(const double* gram, const double* preference, Scale, double rtol, int64_t tasks, Alignment,
           double* workspace, Place);

// gram, align and combine of its weights, at one call: rows of one type, `workspace` of merge_workspace(...) float64.
int64_t merge_workspace(int64_t tasks, int64_t columns);
void merge(DType, Rows, const double* preference, Scale, double rtol, Alignment, void* const* out, double* workspace,
           Place);

// Other rules: gram -> weights [T]; math/rules.h has the formulas. T <= kMaxAlignTasks; preference [T] (null: 1 / T).
// Anything not finite in gram makes every weight NaN. upgrad's workspace holds T x T float64.
void upgrad(const double* gram, const double* preference, int64_t tasks, double* weights, double* workspace, Place);
void dualproj(const double* gram, const double* preference, int64_t tasks, double* weights, Place);
void mgda(const double* gram, int64_t tasks, double* weights, Place);
void cagrad(const double* gram, double c, int64_t tasks, double* weights, Place);
void fairgrad(const double* gram, double alpha, bool normalize, int64_t tasks, double* weights, Place);
void imtlg(const double* gram, int64_t tasks, double* weights, Place);

// step [1], on the kernel's device: seed and step alone decide the orders.
void pcgrad(const double* gram, int64_t seed, const int64_t* step, int64_t tasks, double* weights, Place);

// One step of an optimizer, every element read and written once: moments and parameters in place, and, where `squares`
// is given, squares[p][t] <- square_decay squares[p][t] + (1 - square_decay) * the sum of squares over the tensor of the
// task's update. `gradients` are of the parameters' type. Float32 arithmetic (float64 for float64), rounded once to the
// type that is stored. A task that is not present keeps its moments and adds nothing. Types: float32 and bfloat16
// parameters with float32 or bfloat16 moments, float64 with float64. RMSprop's buffer holds the sum over tasks:
// b <- momentum b + sum_t w_t g_t / (...), parameter <- parameter - lr b. `workspace` holds adatask_workspace(...)
// float64, and is needed for `squares` alone.
int64_t adatask_workspace(int64_t tasks, int64_t tensors, int64_t columns);

// steps[p][t] += 1, float32, for the tasks that are present (null: all), before a step. Host only: torch's addition to many
// tensors takes 2 us each there, and no time on a device.
void count_steps(void* const* steps, int64_t tensors, int64_t tasks, const bool* present);

void adam(DType parameters, DType moments, const Rows& gradients, const StepTensors&, const AdamMoments&, const Adam&,
          const StepSettings&, double* workspace, Place);
void rmsprop(DType parameters, DType moments, const Rows& gradients, const StepTensors&, const RMSpropMoments&,
             const RMSprop&, const StepSettings&, double* workspace, Place);
void adagrad(DType parameters, DType moments, const Rows& gradients, const StepTensors&, const AdagradMoments&,
             const Adagrad&, const StepSettings&, double* workspace, Place);

}  // namespace cpu

// The kernels that there are on both kinds of device.
// clang-format off
#define MTLGRAD_KERNELS(K) \
  K(regression_moments) \
  K(binary_moments) \
  K(multiclass_moments) \
  K(sample_residuals) \
  K(sampled_moments) \
  K(precision_mean) \
  K(weighted_mean) \
  K(gram_workspace) \
  K(gram) \
  K(dots_workspace) \
  K(dots) \
  K(combine) \
  K(add_weighted) \
  K(align_workspace) \
  K(align) \
  K(merge_workspace) \
  K(merge) \
  K(upgrad) \
  K(dualproj) \
  K(mgda) \
  K(cagrad) \
  K(fairgrad) \
  K(imtlg) \
  K(pcgrad) \
  K(adatask_workspace) \
  K(adam) \
  K(rmsprop) \
  K(adagrad)
// clang-format on

// The same signatures, on device memory.
namespace cuda {
#define MTLGRAD_DECLARE(name) decltype(cpu::name) name;
MTLGRAD_KERNELS(MTLGRAD_DECLARE)
#undef MTLGRAD_DECLARE

int device_count();          // 0 without a driver or a device; never throws
std::string device_error();  // why device_count() is 0, or ""
int runtime_version();
}  // namespace cuda

}  // namespace mtlgrad

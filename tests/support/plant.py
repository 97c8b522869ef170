"""Plants eighty bugs, one by one, and says which no test caught.

``python -m tests.support.plant [NUMBERS...]``, by the Python of the developer environment; works in a copy of the
checkout in the folder for temporary files. A bug meets the tests that are named with it first and, if these pass, the
quick suite. Results go to planted.csv, a row a bug, written after each: a run that was stopped goes on where it was.
With numbers these bugs are planted, whether or not there is a result.
"""

from __future__ import annotations

import contextlib
import csv
import filecmp
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pybind11

ROOT = Path(__file__).resolve().parents[2]
COPY = Path(tempfile.gettempdir(), f"mtlgrad-planted-{os.getuid()}")
RESULTS = Path(__file__).with_name("planted.csv")
ENOUGH = 78
SUITE = ("tests", "-n", "2", "--dist", "worksteal")
NAMED = ("-n", "0", "-m", "")  # slow ones, too
NAMED_LIMIT, SUITE_LIMIT = 900, 7200  #: seconds; a bug may have tests wait for ever
#: Fails for every bug, for the text is not the file's any more.
LEFT_OUT = "tests/docs/test_planted_bugs.py"


class Bug(NamedTuple):
    """A text of a file, which is there once, and the wrong one in its place."""

    file: str
    old: str
    new: str
    what: str  #: goes wrong
    tests: str  #: arguments of pytest: what is to catch it within seconds

    @property
    def mark(self) -> str:
        """Return a short hash of the change, by which a result is known to be this bug's."""
        return hashlib.sha256("\0".join(self[:3]).encode()).hexdigest()[:8]


_ADATASK, _ALIGN, _COMBINE = (f"tests/ops/test_{stem}.py" for stem in ("adatask", "align", "combine"))
_MOMENTS, _RULES = "tests/ops/test_moments.py", "tests/ops/test_rules.py"
_RANKS = "tests/contracts/test_ranks.py"

_KERNELS = (
    # ---- formulas of both kinds of kernels
    Bug(
        "csrc/math/adatask.h",
        "(1.0 + (count - 1.0) * by.lr_decay)",
        "(1.0 + count * by.lr_decay)",
        "AdaGrad's learning rate decays one step too early",
        f"{_ADATASK} -k 'one_task_is_torch_optim and adagrad'",
    ),
    Bug(
        "csrc/math/adatask.h",
        "return static_cast<uint16_t>((all & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);",
        "return static_cast<uint16_t>(rounded);",
        "stochastic rounding carries some NaN over to a number",
        "tests/ops -k rounding_keeps_every_nan",
    ),
    Bug(
        "csrc/math/align.h",
        "return descending[rank / 2];",
        "return descending[(rank - 1) / 2];",
        "of an even number of singular values the larger middle one is the median",
        f"{_ALIGN} -k 'nearest_orthogonal and median'",
    ),
    Bug(
        "csrc/math/align.h",
        "return sqrt(largest / smallest);",
        "return largest / smallest;",
        "the condition number is that of the Gram matrix, not of the gradients",
        f"{_ALIGN} -k graded_matrices",
    ),
    Bug(
        "csrc/math/moments.h",
        "return variance == infinity<T>() ? T(0) : weight;",
        "return weight;",
        "with power 0 tasks without a label take part in the mean",
        f"{_MOMENTS} -k missing_labels_get_no_weight",
    ),
    Bug(
        "csrc/math/moments.h",
        "return target == T(1) ? -at.q : at.p - target;",
        "return at.p - target;",
        "the residual of a confident logit on the right side cancels to zero",
        f"{_MOMENTS} -k 'binary_far_from_the_middle or saturated_logits'",
    ),
    Bug(
        "csrc/math/multiclass.h",
        "-= s.products[c * classes + c] * s.inverse[c];",
        "-= s.products[c * classes + c];",
        "block posteriors: what the logit explains of a variance is not divided by the logit's",
        f"{_MOMENTS} -k 'test_multiclass and block'",
    ),
    Bug(
        "csrc/math/rules.h",
        "% static_cast<uint64_t>(j + 1));",
        "% static_cast<uint64_t>(j));",
        "PCGrad's shuffle never leaves a task in its place: some orders cannot come up",
        f"{_RULES} -k 'reference_and_the_kernels and pcgrad'",
    ),
    Bug(
        "csrc/math/rules.h",
        "weights[i] = lengths[i] > 0.0 ? y[i] * (longest / lengths[i]) : 0.0;",
        "weights[i] = y[i] * (longest / lengths[i]);",
        "IMTL-G divides by the length of a gradient that is zero",
        f"{_RULES} -k 'degenerate and zero'",
    ),
    # ---- of the host
    Bug(
        "csrc/cpu/combine.cpp",
        "std::fill(panel + t * kPitch + filled, panel + t * kPitch + kPanel, 0.0);",
        "std::fill(panel + filled, panel + kPanel, 0.0);",
        "Gram matrix: beyond the last column of all tasks but the first the previous panel is left",
        f"{_COMBINE} -k test_sizes",
    ),
    Bug(
        "csrc/cpu/combine.cpp",
        "if (t + 4 < rows.tasks)",
        "if (t + 4 <= rows.tasks)",
        "weighted sums of more than four tasks: the last four never reach the result",
        f"{_COMBINE} -k 'test_sizes or test_many_tasks'",
    ),
    Bug(
        "csrc/cpu/adatask.cpp",
        "rule.decoupled ? 1.0 - call.lr * settings.weight_decay : 1.0",
        "rule.decoupled ? 1.0 - settings.weight_decay : 1.0",
        "decoupled weight decay forgets the learning rate",
        f"{_ADATASK} -k 'one_task_is_torch_optim and adamw'",
    ),
    Bug(
        "csrc/cpu/adatask.cpp",
        "math::random_stream(key, t, tasks[k].count)",
        "math::random_stream(key, 0, tasks[k].count)",
        "stochastic rounding: all tasks have the same random bits",
        "tests/ops -k kernel_and_reference_round_alike",
    ),
    Bug(
        "csrc/cpu/moments_condition.cpp",
        "for (int64_t i = d; i < width; ++i) sum +=",
        "for (int64_t i = d + 1; i < width; ++i) sum +=",
        "more examples than weights: each variance lacks the first of its summands",
        "tests/ops -k precision_summed_and_inverted",
    ),
    Bug(
        "csrc/cpu/moments_sampled.cpp",
        "if (r[k * rows] != r[k * rows]) {",
        "if (r[0] != r[0]) {",
        "weight samples: of four examples the first one's label decides whether all have one",
        f"{_MOMENTS} -k missing_labels_have_no_gradient",
    ),
    # ---- of the device
    Bug(
        "csrc/cuda/reduce.cuh",
        "if (lane == 0) partial[threadIdx.x / kWarp] = v;\n  __syncthreads();",
        "if (lane == 0) partial[threadIdx.x / kWarp] = v;",
        "a block's sum is read before all warps have written theirs",
        f"{_MOMENTS} -k test_regression",
    ),
    Bug(
        "csrc/cuda/combine.cuh",
        "* kGroup * kGroup + i % kGroup * kGroup + j % kGroup;",
        "* kGroup * kGroup + j % kGroup * kGroup + i % kGroup;",
        "Gram matrix of more than eight tasks: blocks off the diagonal are transposed",
        f"{_COMBINE} -k test_many_tasks",
    ),
    Bug(
        "csrc/cuda/combine.cuh",
        "case 3: add_rows<T, 3>(sums, first, c, row, weights); break;",
        "case 3: add_rows<T, 2>(sums, first, c, row, weights); break;",
        "weighted sums of 3, 7, 11, ... tasks lack the last one",
        f"{_COMBINE} -k test_sizes",
    ),
    Bug(
        "csrc/cuda/align.cuh",
        "  block_barrier<kThreads>();\n  if (thread >= tasks) return;",
        "  if (thread >= tasks) return;",
        "weights are summed before the other threads have written their part of the alignment",
        f"{_ALIGN} -k nearest_orthogonal",
    ),
    Bug(
        "csrc/cuda/rules.cuh",
        "for (int i = team.lane; i < n; i += kWarp)\n    math::resolve_conflicts",
        "if (const int i = team.lane; i < n)\n    math::resolve_conflicts",
        "PCGrad of more than 32 tasks: the others' gradients are what was in memory",
        f"{_RULES} -k 'reference_and_the_kernels and pcgrad'",
    ),
    Bug(
        "csrc/cuda/adatask.cuh",
        "for (int w = 0; w < kRowWarps; ++w) now.sums[w][t] = 0.0;",
        "now.sums[0][t] = 0.0;",
        "average squared updates: only the first warp's sums begin at zero",
        f"{_ADATASK} -k average_squares_are_of_each",
    ),
    Bug(
        "csrc/cuda/moments.cuh",
        "sums.ddu = warp_sum(sums.ddu), sums.ddh = warp_sum(sums.ddh);",
        "sums.ddu = warp_sum(sums.ddu);",
        "binary variances: one of the six quadrature sums is not added up over the warp",
        f"{_MOMENTS} -k test_binary",
    ),
    Bug(
        "csrc/cuda/moments_multiclass.cuh",
        "class_covariance, threadIdx.x, kThreads);\n    __syncthreads();",
        "class_covariance, threadIdx.x, kThreads);",
        "variances are evaluated before all coefficients are corrected",
        f"{_MOMENTS} -k 'test_multiclass and full'",
    ),
    Bug(
        "csrc/cuda/moments_sampled.cuh",
        "if (begin + kRows < rows) copy(count_from(begin + kRows), buffer ^ 1);",
        "if (begin + kRows < rows) copy(count_from(begin + kRows), buffer);",
        "weight samples: the next tile is copied over the one in use",
        f"{_MOMENTS} -k test_sampled",
    ),
)

_OPERATIONS = (
    # ---- operations
    Bug(
        "python/mtlgrad/ops/checks.py",
        "((targets < 0) | (targets >= classes))",
        "((targets < 0) | (targets > classes))",
        "a class index one too large is not refused",
        "tests/ops -k 'errors or refused'",
    ),
    Bug(
        "python/mtlgrad/ops/rows.py",
        "return [tensors[p].contiguous() for p in self.places]",
        "return [tensors[p] for p in self.places]",
        "a base or vector with strides is read as if it were dense",
        "tests/ops/test_displace.py -k test_layouts",
    ),
    Bug(
        "python/mtlgrad/ops/moments.py",
        "_launch(name, features, rows, targets.contiguous(), at.given,",
        "_launch(name, features, rows, targets, at.given,",
        "targets with strides are read as if they were dense: other examples' labels",
        "tests/ops/test_contract.py -k 'test_layouts and regression_moments'",
    ),
    Bug(
        "python/mtlgrad/ops/align.py",
        "        mark_written(self.result)\n",
        "",
        "autograd does not hear that a result it has saved was overwritten",
        "tests/methods/test_aligned.py -k known_to_be_written",
    ),
    Bug(
        "python/mtlgrad/ops/combine.py",
        "rows.groups(), out[0].zero_(), launch_place",
        "rows.groups(), out[0], launch_place",
        "the Gram matrix is added to what was in memory",
        "tests/ops -k nothing_of_what_was_in_memory",
    ),
    Bug(
        "python/mtlgrad/ops/displacement.py",
        "if i > starts[-1] and total + size > most:",
        "if i > starts[-1] and total > most:",
        "rows that come from the host take more memory than they may",
        "tests/ops -k test_chunks",
    ),
    Bug(
        "python/mtlgrad/ops/rules.py",
        "check_shape(op, name, option, (len(gram),))",
        "pass",
        "a preference of another length is not refused, and memory behind it read",
        "tests/ops -k 'errors or refused'",
    ),
    Bug(
        "python/mtlgrad/ops/adatask.py",
        "    for tensor, copy in copies:\n        tensor.copy_(copy)",
        "    for tensor, copy in copies:\n        copy.copy_(tensor)",
        "parameters that are not dense do not move",
        "tests/ops -k 'layouts and adatask'",
    ),
    # ---- references
    Bug(
        "python/mtlgrad/reference/adatask.py",
        "value=-1.0).clamp_min(0.0)",
        "value=-1.0)",
        "centered RMSProp: a variance that rounds below zero becomes NaN",
        f"{_ADATASK} -k variance_of_zero",
    ),
    Bug(
        "python/mtlgrad/reference/align.py",
        "torch.where(kept, values, 0.0).sum() / rank",
        "torch.where(kept, values, 0.0).sum() / tasks",
        "scale rmse of dependent gradients is a mean over all, not over those kept",
        "tests/published/test_interop_torchjd.py -k dependent_gradients",
    ),
    Bug(
        "python/mtlgrad/reference/moments.py",
        "((g - g.mean(0)) ** 2).mean(0), missing",
        "g.var(0), missing",
        "weight samples: the variance is divided by one sample less",
        f"{_MOMENTS} -k test_sampled",
    ),
    Bug(
        "python/mtlgrad/reference/rules.py",
        "if normalize else 1.0 / largest",
        "if normalize else 1.0",
        "FairGrad without normalize forgets that the matrix was scaled",
        f"{_RULES} -k 'reference_and_the_kernels and fairgrad'",
    ),
    # ---- ranks
    Bug(
        "python/mtlgrad/world/ranks.py",
        "torch.cat([part[:count] for part, count in zip(every, counts)])",
        "torch.cat(list(every))",
        "of ranks with fewer examples the padding is gathered, too",
        f"{_RANKS} -k test_collectives",
    ),
    Bug(
        "python/mtlgrad/world/ranks.py",
        "return self.sum_(values).div_(self.size) if self.size > 1 else values",
        "return self.sum_(values)",
        "alphaVIL's losses and gradients of alpha are sums over the ranks, not means",
        f"{_RANKS} -k closures_give_the_mean_loss",
    ),
    Bug(
        "python/mtlgrad/world/jacobians.py",
        'getattr(jacobian, "_averaged", None) == (group.group_name, jacobian._version)',
        'getattr(jacobian, "_averaged", (None,))[0] == group.group_name',
        ".jac that a rank wrote into after the average passes for the mean",
        f"{_RANKS} -k a_mean_that_was_written_into",
    ),
    Bug(
        "python/mtlgrad/world/shards.py",
        "return key + (number << 32)",
        "return key",
        "stochastic rounding: all shards of a parameter have the same random bits",
        "tests/contracts/test_fsdp.py -k random_bits",
    ),
)

_METHODS = (
    # ---- rules
    Bug(
        "python/mtlgrad/rules/gram_rule.py",
        "            if not world.is_rank0:\n                self._weights.zero_()\n",
        "",
        "a rule that draws weighs by the sum over the ranks of their weights, not by the first one's",
        f"{_RANKS} -k 'one_process and aligned-merge-2'",
    ),
    Bug(
        "python/mtlgrad/rules/pcgrad.py",
        'self.register_buffer("draws", torch.zeros((), dtype=torch.int64))',
        'self.register_buffer("draws", torch.zeros((), dtype=torch.int64), persistent=False)',
        "PCGrad's state is not saved: a resumed run draws the first orders again",
        "tests/methods/test_rules.py -k pcgrad_draws_anew",
    ),
    Bug(
        "python/mtlgrad/rules/aligned.py",
        "if isinstance(rows, list) and not self.check_finite:",
        "if isinstance(rows, list):",
        "AlignedMTL's layer lets NaN through in spite of check_finite",
        "tests/methods/test_aligned.py -k nan_and_infinity",
    ),
    # ---- gradients a task
    Bug(
        "python/mtlgrad/jacobian.py",
        "            some.update(before)",
        "            pass",
        "the user's hooks on the features are gone after task_backward",
        "tests/methods -k hooks_run_once_a_task",
    ),
    Bug(
        "python/mtlgrad/jacobian.py",
        "jacobian if order is None else jacobian[order])",
        "jacobian)",
        "a micro-batch whose losses come in another order is added to other tasks' rows",
        "tests/contracts -k losses_in_another_order",
    ),
    # ---- metrics, losses of several ranks
    Bug(
        "python/mtlgrad/metrics.py",
        "total += -change if higher else change",
        "total += change if higher else -change",
        "Delta_m has the sign the wrong way round",
        "tests/methods/test_metrics.py -k formula_and_sign",
    ),
    Bug(
        "python/mtlgrad/metrics.py",
        'return average / (1.0 - beta ** float(state["count"]))',
        "return average",
        "dominance under Adam forgets the bias correction of the first moment",
        "tests/methods/test_metrics.py -k updates_add_up",
    ),
    Bug(
        "python/mtlgrad/distributed.py",
        "factors = world.size / counts.clamp(min=1.0)",
        "factors = 1.0 / counts.clamp(min=1.0)",
        "global_means forgets that gradients are averaged over the ranks afterwards",
        f"{_RANKS} -k test_global_means",
    ),
    # ---- BayesAgg
    Bug(
        "python/mtlgrad/bayesagg/full_data.py",
        "else values + self.decay * self.squares.to(values.device)",
        "else values + self.squares.to(values.device)",
        "moving statistics: the noise is estimated from squares that never decay",
        "tests/methods -k noise_of_sums",
    ),
    Bug(
        "python/mtlgrad/bayesagg/full_data.py",
        'self.squares = state["squares"]',
        "self.squares = None",
        "a resumed epoch estimates the noise from the batches after the checkpoint alone",
        "tests/methods -k test_state",
    ),
    Bug(
        "python/mtlgrad/bayesagg/layer.py",
        "self._working, self._agreed, self._since, self._look = [], world, 0, True",
        "self._agreed, self._since, self._look = world, 0, True",
        "batches after the second refresh still have the first one's posterior as prior",
        "tests/methods -k the_step_after_knows_new_noise",
    ),
    Bug(
        "python/mtlgrad/bayesagg/layer.py",
        "seed=self.seed * 1_000_003 + self._number,",
        "seed=self.seed * 1_000_003,",
        "every batch has the same weight samples",
        "tests/methods/test_bayesagg.py -k follow_seed_and_pass",
    ),
    Bug(
        "python/mtlgrad/bayesagg/global_batch.py",
        "with_prior=world.is_rank0)",
        "with_prior=True)",
        "several ranks count the prior as often as there are ranks",
        f"{_RANKS} -k 'one_process and bayesagg-full-stored'",
    ),
    # ---- posteriors
    Bug(
        "python/mtlgrad/posterior/posteriors.py",
        "solve_triangular(self.factor.mT, columns, upper=True).permute(2, 0, 1)",
        "solve_triangular(self.factor, columns, upper=False).permute(2, 0, 1)",
        "samples of a posterior have the right spread in the wrong directions",
        "tests/methods/test_posterior.py -k samples_have_the_posterior_s_moments",
    ),
    Bug(
        "python/mtlgrad/posterior/posteriors.py",
        '"sums": {name: value.clone() for name, value in self._sums().items()},',
        '"sums": dict(self._sums()),',
        "later batches change a state that was saved before",
        "tests/methods/test_posterior.py -k later_batches_change_no_state",
    ),
    Bug(
        "python/mtlgrad/posterior/likelihoods.py",
        "residual, curvature = (x.masked_fill(missing, 0.0) for x in (residual, curvature))",
        "residual = residual.masked_fill(missing, 0.0)",
        "binary tasks: examples without a label make the posterior more certain",
        "tests/methods/test_posterior.py -k full_posterior_is_the_quadratic",
    ),
    # ---- AdaTask's optimizers
    Bug(
        "python/mtlgrad/optim/base.py",
        "            some.spent = True",
        "            some.spent = False",
        "where the model's zero_grad is called, gradients of all steps add up in .jac",
        "tests/contracts -k module_zero_grad",
    ),
    Bug(
        "python/mtlgrad/optim/base.py",
        'options["present"] = present if group["missing"] == "still" else None',
        'options["present"] = None',
        'moments of absent tasks decay in spite of missing="still"',
        "tests/methods/test_adatask.py -k missing_tasks",
    ),
    Bug(
        "python/mtlgrad/optim/clip.py",
        "factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)",
        "factors = max_norm / (norms + 1e-6)",
        "clipping makes short gradients longer",
        "tests/contracts -k 'clipping_by_hand or clips_in_its_step'",
    ),
    Bug(
        "python/mtlgrad/optim/amp.py",
        "noted[device] = noted[device] + infinite if device in noted else infinite",
        "noted[device] = infinite",
        "after unscale_jac_ an infinity in a head's .grad no longer skips the step",
        "tests/contracts -k skips_a_step_for_grad_alone",
    ),
    # ---- alphaVIL
    Bug(
        "python/mtlgrad/alphavil/method.py",
        "self._task_weights = self._task_weights + (now.alphas - 1.0)",
        "self._task_weights = self._task_weights * now.alphas",
        "task weights are multiplied by alpha: right in the first round alone",
        "tests/methods/test_alphavil.py -k weights_gather",
    ),
    Bug(
        "python/mtlgrad/alphavil/tasks.py",
        "math.ceil(subset * total - 1e-9)",
        "math.ceil(subset * total)",
        "a fraction of the batches is one batch too many where its product rounds up",
        "tests/methods -k not_rounded_up",
    ),
    Bug(
        "python/mtlgrad/alphavil/buffers.py",
        "self.merged[name] = torch.maximum(self.merged[name], b)",
        "self.merged[name] = b.clone()",
        "counters of batches are the last task's, not the largest",
        "tests/methods/test_alphavil.py -k the_rules_of_buffers",
    ),
    Bug(
        "python/mtlgrad/alphavil/search.py",
        "    model.eval()\n    try:",
        "    try:",
        "the search judges with dropout and batch statistics",
        "tests/methods/test_alphavil.py -k loaders_and_dropout_done_literally",
    ),
    # ---- other packages
    Bug(
        "python/mtlgrad/interop/torchjd.py",
        "align(gramian, preference, self.scale_mode, self.rtol)",
        "align(gramian, preference, self.scale_mode)",
        "TorchJD's AlignedMTL: rtol is ignored",
        "tests/published/test_interop_torchjd.py -k tolerance_can_be_chosen",
    ),
    Bug(
        "python/mtlgrad/interop/lightning.py",
        "(step + 1) % self._every(trainer)",
        "step % self._every(trainer)",
        "Lightning: values are logged one step off those of self.log",
        "tests/published/test_lightning.py -k steps_are_those_of_self_log",
    ),
)

_RECIPES = (
    Bug(
        "python/mtlgrad/recipes/training.py",
        '        self.schedule.last_epoch = state["schedule"]["last_epoch"]',
        "        pass",
        "a resumed run begins its learning rate schedule anew",
        "tests/recipes/test_training.py -k resuming_repeats",
    ),
    Bug(
        "python/mtlgrad/recipes/methods.py",
        "mean_(torch.stack(losses).detach())",
        "mean_(torch.stack(losses))",
        "log losses are divided by themselves with their graph: gradients are zero",
        "tests/recipes/test_training.py -k weighted_sums_are_their_formulas",
    ),
    Bug(
        "python/mtlgrad/recipes/report.py",
        "math.log(max(value, 1e-12)) * (-1 if up else 1)",
        "math.log(max(value, 1e-12)) * (1 if up else -1)",
        "the learning rate with the worst validation metrics is taken",
        "tests/recipes/test_comparison.py -k scores_are_relative_changes",
    ),
    Bug(
        "python/mtlgrad/recipes/comparison.py",
        "if settings.digest != digest(settings.recipe):",
        "if settings.digest is None:",
        "a run goes on with a recipe that was changed in between",
        "tests/recipes/test_comparison.py -k changed_is_not_resumed",
    ),
    Bug(
        "python/mtlgrad/recipes/folder.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "two processes may continue one run at once",
        "tests/recipes/test_comparison.py -k not_continued_twice",
    ),
    Bug(
        "python/mtlgrad/recipes/progress.py",
        "shutil.rmtree(path, ignore_errors=True)",
        "path.parent.mkdir(parents=True, exist_ok=True)",
        "TensorBoard shows the epochs before an interruption twice",
        "tests/recipes/test_comparison.py -k tensorboard",
    ),
    Bug(
        "python/mtlgrad/recipes/recipe.py",
        "mean = values[train].nanmean(0).nan_to_num()",
        "mean = values.nanmean(0).nan_to_num()",
        "validation and test rows leak into the scale of the inputs",
        "tests/recipes/test_packaged_recipes.py -k only_training_rows",
    ),
    Bug(
        "python/mtlgrad/recipes/recipe.py",
        "manual_seed(2_000_000_000 + seed)",
        "manual_seed(2_000_000_000)",
        "random splits do not depend on the seed",
        "tests/recipes/test_packaged_recipes.py -k random_splits",
    ),
    Bug(
        "python/mtlgrad/recipes/tasks.py",
        "below = torch.searchsorted(negative, positive) +",
        "below = torch.searchsorted(negative, positive, right=True) +",
        "AUC counts ties as wins",
        "tests/recipes/test_tasks.py -k auc",
    ),
    Bug(
        "python/mtlgrad/recipes/tasks.py",
        "values.masked_fill(missing, 0.0).sum() / (~missing).sum().clamp_min(1)",
        "values.masked_fill(missing, 0.0).mean()",
        "losses are means over all examples, not over those with a label",
        "tests/recipes/test_tasks.py -k losses_are_means",
    ),
    Bug(
        "python/mtlgrad/recipes/toy.py",
        "first + along.clamp(0.0, 1.0) * step",
        "first + along * step",
        "a descent that ends beyond the front counts as being on it",
        "tests/recipes/test_toy.py -k distances",
    ),
    Bug(
        "python/mtlgrad/data/chestxray.py",
        '[name for name in lists[0] if name.partition("_")[0] not in held_out]',
        "list(lists[0])",
        "radiographs of the validation patients are trained on",
        "tests/recipes/test_image_recipes.py -k radiographs",
    ),
    Bug(
        "python/mtlgrad/cli.py",
        "< math.inf and (value or zero):",
        "< math.inf:",
        "a learning rate of zero is accepted",
        "tests/recipes/test_command_line.py -k bad_input",
    ),
    Bug(
        "python/mtlgrad/plots.py",
        "columns = min(len(layers), 5)",
        "columns = len(layers)",
        "dominance of many layers is one row, wider than any screen",
        "tests/recipes/test_comparison.py -k figures_grow",
    ),
)

BUGS = (*_KERNELS, *_OPERATIONS, *_METHODS, *_RECIPES)


class Copy:
    """A copy of the checkout, with compiled kernels and an environment whose ``import mtlgrad`` finds it."""

    def __init__(self) -> None:
        self._bring_up_to_date()
        packages, environment = Path(sysconfig.get_path("purelib")), COPY / "build/env"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
        # By a plain path, so that the .pth files that lie there are not read: one of them leads to the checkout.
        [site] = environment.glob("lib/python3*/site-packages")
        (site / "packages.pth").write_text(f"{packages}\n")
        self._python = str(environment / "bin/python")
        headers = packages / "nvidia/cu13"
        self._environment = {
            **({"CUDA_HOME": str(headers)} if headers.exists() else {}),
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(COPY / "python"), str(COPY)]),
            "OMP_NUM_THREADS": "1",
        }
        extension = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        with contextlib.suppress(FileExistsError):
            (COPY / "python/mtlgrad" / extension).symlink_to(COPY / "build/cpu" / extension)
        self._stale = True  # something is to be compiled

    def _bring_up_to_date(self) -> None:
        """Copy what differs, so that nothing else is compiled again; remove what the checkout does not have."""
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
        known = {name for name in names if (ROOT / name).is_file()}
        for name in known:
            source, target = ROOT / name, COPY / name
            if not target.is_file() or not filecmp.cmp(source, target, shallow=False):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
        for folder in {name.partition("/")[0] for name in known if "/" in name}:
            for path in (COPY / folder).rglob("*.*"):
                made = path.name.startswith("_C.") or path.suffix == ".pyc"
                if path.is_file() and not made and str(path.relative_to(COPY)) not in known:
                    path.unlink()

    def _build(self) -> None:
        folder, python = COPY / "build/cpu", f"-DPython_EXECUTABLE={self._python}"
        options = (
            python,
            "-DMTLGRAD_CUDA=OFF",
            "-DCMAKE_BUILD_TYPE=None",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        )
        for command in (
            ("cmake", "-S", COPY, "-B", folder, "-G", "Ninja", *options),
            ("cmake", "--build", folder, "--target", "_C"),
            (self._python, "-c", "from tests.simt.build import build; build('_C')"),
        ):
            done = subprocess.run(command, cwd=COPY, env=self._environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{done.stdout[-4000:]}{done.stderr[-4000:]}\nnot built")
        self._stale = False

    @contextlib.contextmanager
    def _planted(self, bug: Bug) -> Iterator[None]:
        path = COPY / bug.file
        before = path.read_text()
        assert before.count(bug.old) == 1, bug
        try:
            path.write_text(before.replace(bug.old, bug.new))
            self._stale = self._stale or bug.file.startswith("csrc/")
            yield
        finally:
            path.write_text(before)
            self._stale = self._stale or bug.file.startswith("csrc/")

    def failure(self, *tests: str, limit: int = NAMED_LIMIT) -> str:
        """Return the first test that fails, or what happened in its place; empty if all pass."""
        if self._stale:
            self._build()
        command = [self._python, "-m", "pytest", "-x", "-q", "--tb=no", f"--ignore={LEFT_OUT}", *tests]
        with tempfile.TemporaryFile("w+") as output:
            # A session of its own, of which nothing is left behind: ranks may wait for one that died.
            process = subprocess.Popen(
                command, cwd=COPY, env=self._environment, stdout=output, stderr=output, start_new_session=True
            )
            code: int | None = None
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(limit)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            output.seek(0)
            said = output.read()
        if code in (4, 5):  # pytest's: there are no such tests
            raise SystemExit(f"{said[-2000:]}\nno tests: {shlex.join(tests)}")
        found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.MULTILINE)
        happened = f"no end in {limit} s" if code is None else f"Python ends with {code}"
        return "" if code == 0 else found[1] if found else f"{happened}: {shlex.join(tests)}"

    def find(self, bug: Bug, broken: list[str]) -> str:
        """Return what catches the bug, or "nothing". What fails without it, too, is added to ``broken``."""
        with self._planted(bug):
            if found := self.failure(*NAMED, *shlex.split(bug.tests)):
                return found
        while True:
            with self._planted(bug):
                found = self.failure(*SUITE, *(f"--deselect={test}" for test in broken), limit=SUITE_LIMIT)
            if not found.startswith("tests/") or not self.failure(*NAMED, found):
                return found or "nothing"
            broken.append(found)


def read_results() -> dict[str, dict[str, str]]:
    """Return the rows by the bugs' marks."""
    if not RESULTS.exists():
        return {}
    with RESULTS.open(newline="") as file:
        return {row["mark"]: row for row in csv.DictReader(file)}


def write_results(rows: dict[str, dict[str, str]]) -> None:
    with RESULTS.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("number", "file", "what", "caught_by", "seconds", "mark"))
        for number, bug in enumerate(BUGS, 1):
            if row := rows.get(bug.mark):
                table.writerow((number, bug.file, bug.what, row["caught_by"], row["seconds"], bug.mark))


def main(numbers: list[int]) -> int:
    rows, broken = read_results(), list[str]()
    if chosen := numbers or [n for n, bug in enumerate(BUGS, 1) if bug.mark not in rows]:
        copy = Copy()
        for tests in dict.fromkeys(BUGS[n - 1].tests for n in chosen):
            if found := copy.failure(*NAMED, *shlex.split(tests)):
                raise SystemExit(f"without any bug: {found}")
    for n in chosen:
        bug, start = BUGS[n - 1], time.monotonic()
        caught = copy.find(bug, broken)
        rows[bug.mark] = {"caught_by": caught, "seconds": f"{time.monotonic() - start:.0f}"}
        write_results(rows)
        print(f"{n} {bug.file}: {bug.what}: {caught}", flush=True)
    results = {n: rows[bug.mark]["caught_by"] for n, bug in enumerate(BUGS, 1) if bug.mark in rows}
    missed = [n for n, caught in results.items() if caught == "nothing"]
    count = len(results) - len(missed)
    print(f"caught {count} of {len(BUGS)}; {len(BUGS) - len(results)} were not planted")
    for n in missed:
        print(f"not caught: {n} {BUGS[n - 1].file}: {BUGS[n - 1].what}")
    if broken:
        print(f"fail without a bug, too: {' '.join(broken)}")
    return int(count < ENOUGH)


if __name__ == "__main__":
    raise SystemExit(main(list(map(int, sys.argv[1:]))))

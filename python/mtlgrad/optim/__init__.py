"""AdaTask's optimizers (Yang et al., AAAI 2023, arXiv 2211.15055) as drop-in ``torch.optim`` optimizers."""

from .adagrad import AdaTaskAdagrad
from .adam import AdaTaskAdam, AdaTaskAdamW
from .amp import unscale_jac_
from .clip import clip_task_grad_norm_
from .rmsprop import AdaTaskRMSprop

__all__ = ["AdaTaskAdagrad", "AdaTaskAdam", "AdaTaskAdamW", "AdaTaskRMSprop", "clip_task_grad_norm_", "unscale_jac_"]

"""Surgery as a trainer of open-unlearning (github.com/locuslab/open-unlearning), unmodified.

In its folder, with this package installed beside it:

    python -m gradsurgery.integrations.open_unlearning src/train.py --config-name=unlearn.yaml \
        experiment=unlearn/tofu/default trainer=Surgery trainer.method_args.rule=gru ...

`trainer=Surgery` is `configs/trainer/Surgery.yaml` here, and its `method_args` are options of
`SurgeryMixin`: any rule, any forget loss.
"""

from gradsurgery.integrations.open_unlearning.registry import CONFIGS, launch, register

__all__ = ["CONFIGS", "launch", "register"]

"""Queue a script on a Slurm cluster: torchrun on every node, queued again when its time is over.

python scripts/submit.py nodes=4 partition=gpu -- scripts/vision.py experiment=vit/imagenet profile=paper data.root=/in
python scripts/submit.py cluster=local gpus_per_node=0 -- scripts/vision.py profile=smoke    to try it without Slurm
"""

import sys

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from entreg.cli import CONFIGS, entry_point
from entreg.errors import ConfigError
from entreg.names import nearest
from entreg.runs.slurm import submit


@entry_point
def main() -> None:
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    settings = OmegaConf.load(CONFIGS / "accelerate" / "slurm.yaml")
    known = list(settings)
    OmegaConf.set_struct(settings, True)
    try:
        settings.merge_with_dotlist(words[:cut])
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{' '.join(words[:cut])} is not key=value of slurm.yaml{nearest('', known)}") from error
    job = submit(OmegaConf.to_container(settings), words[cut + 1 :])
    print(f"job {job.job_id}: {job.paths.stdout}")


if __name__ == "__main__":
    main()

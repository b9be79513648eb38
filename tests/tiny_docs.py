"""The tiny form of every documented command: what a page's words stand for here, and what is not run, and why.

Launchers that a page names run in their ``TINY=1`` column (test_scripts.py parses all of them in both), and all else that
is shortened is in these tables.  ``{checkpoints}`` is the folder of the committed tiny models; other names are those of files
on the desk, and of runs, which launchers make (reader.py).
"""

from __future__ import annotations

STANDS_FOR = {
    # models, rewards and their data
    "--pretrained-model Qwen/Qwen-Image": "--pretrained-model {checkpoints}/tiny-qwen-image",
    "--pretrained-model black-forest-labs/FLUX.1-dev": "--pretrained-model {checkpoints}/tiny-flux --text-length 32",
    "--pretrained-model MODEL": "--pretrained-model {checkpoints}/tiny-sd3 --text-length 32",
    "[--teacher": "[--teacher --teacher-num-steps 2 --resolution 64",
    "clip=FILE": "clip={checkpoints}/tiny-clip",
    "hpsv2=FILE": "hpsv2={checkpoints}/tiny-hps",
    "clip=OTHER_CLIP_FOLDER": "clip={checkpoints}/tiny-clip-heldout",
    "--held-out-model FOLDER": "--held-out-model {checkpoints}/tiny-clip-heldout",
    "--reference FOLDER_OR_TABLE": "--reference real/metadata.csv",
    "DFN5B.bin": "{checkpoints}/tiny-clip",
    "HPS_v2.1_compressed.pt": "{checkpoints}/tiny-hps",
    "pickscore=FOLDER": "pickscore=PickScore_v1",
    "DIGEST": "{pickscore_digest}",
    "module:function": "shapes.oracle:adherence",
    "checkpoints/t2i-2m-filtered-prompts.txt": "prompts.txt",
    "--prompts FILE": "--prompts prompts.txt",
    "DATA_PATH_TRAIN=metadata.json": "DATA_PATH_TRAIN=runs/edits/metadata.json",
    # runs, and what they leave
    "evaluate A B": "evaluate runs/cold_start_sd3 runs/dmdr_sd3_refl",
    "RUN": "runs/cold_start_sd3",
    "DIR": "embeddings",
    # how much, how long, on what
    "--count 10000": "--count 4",
    "--count 800": "--count 2",
    "--count 553": "--count 1",
    "--count 500": "--count 2",
    "--num-inference-steps 40": "--num-inference-steps 2",
    "--resolution 1328": "--resolution 64",
    "--mixed-precision bf16": "--mixed-precision no",
    "--published --device cuda --dtype bfloat16": "--device cpu --dtype bfloat16",
    "scripts/benchmark.sh": "scripts/benchmark.sh --steps 1 --ratio-update 1",
    "--layouts shared,paired --mixed-precision no,bf16": "--layouts shared --mixed-precision no --batch-size 2",
    "checkpoints/tiny-sd3,checkpoints/tiny-flux": "{checkpoints}/tiny-flux --batch-size 2",
    "--layouts shared --checkpointing off,on": "--layouts shared --checkpointing on",
    "--backends ddp,fsdp2": "--backends fsdp2 --checkpointing off",
    "scripts/chaos.sh": "scripts/chaos.sh --kills 1",
    "--kills 20": "--kills 1",
    # machines and processes: one on this one (several: tests/launched.py; by SSH: tests/launch/test_launch_ssh.py)
    "--num_processes 8": "--num_processes 1",
    "--nproc-per-node 8": "--nproc-per-node 1",
    "--nproc-per-node 4": "--nproc-per-node 1",
    "--nnodes 3": "--nnodes 1",
    "--master-addr 10.0.0.1 --master-port 29500": "--master-addr 127.0.0.1 --master-port {port}",
    "NUM_MACHINES=3 MACHINE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 NUM_PROCESSES=8": "NUM_PROCESSES=1",
    "scripts/multi_node/multi.sh": "scripts/multi_node/multi.sh --dry-run",
}

# flags that a program gets besides; the last one wins
OF_TRAIN = {  # of all runs, and by method
    "all": "--batch-size 2 --batch-size-test 2 --max-train-steps 1 --checkpoint-steps 1 --sample-steps 1",
    "dmdr": "--teacher-num-steps 2 --cold-start-iter 1 --ratio-update 1",
    "direct": "",
    "arcflow": "--teacher-num-steps 2",
    "sft": "--teacher-num-steps 2",
}
OF_VERBS = {
    "pairs": "--resolution 64 --mixed-precision no --num-inference-steps 2",
    "cache": "--batch-size 2",
}
MODELS = {  # where a page leaves the model to the reader, or to a default
    "train": "--pretrained-model {checkpoints}/tiny-sd3 --text-length 32 --resolution 64 --mixed-precision no --use-lora-gen "
    "--data-path-train prompts.txt --exp-name by-hand-{number}",
    "pairs": "--pretrained-model {checkpoints}/tiny-sdxl",
}

# beginnings of commands -> why they are not run here
NOT_RUN = {
    "bash scripts/quickstart.sh": "tests/test_quickstart.py runs it, from the pairs to the report",
    "bash scripts/test.sh": "it is what runs this",
    "bash scripts/benchmark_gpu.sh": "tests/test_benchmark.py runs it, with less time",
    "source .venv/bin/activate": "this runs in an environment already",
    "conda env create": "makes an environment, from the network",
    "conda activate": "of that environment",
    "uv sync": "of that environment",
    "python -m train_t2i fetch": "gigabytes from the network; tests/test_fetch.py has a server of its own",
    "sbatch": "needs a cluster; tests/launch/test_launch_slurm.py runs the job on one of its own",
    "python -c import hpsv2": "HPSv2's own program, which cannot be installed beside ours",
    "python evaluation/evaluate_images.py": "GenEval's own program and its detectors",
}

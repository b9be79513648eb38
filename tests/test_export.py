"""An exported folder in stock diffusers: the student's times, the student's images."""

from __future__ import annotations

import functools
import json
import shlex

import pytest
import stock
import tiny_runs
import torch

from train_t2i.__main__ import main

PROMPTS, SEEDS = ["a red circle", "blue"], [3, 4]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, sdxl_folder, prompts_file):
    root = tmp_path_factory.mktemp("runs")
    made = {}

    def run(name, more="", method="dmdr"):
        if name not in made:
            made[name] = tiny_runs.train(root, name, more, method, model=sdxl_folder, prompts=prompts_file)
        return made[name]

    return run


def export(run, out, more=""):
    assert main(["export", str(run), "--to", "pipeline", "--out", str(out), *shlex.split(more)]) == 0
    return out


def stock_pipeline(folder, **options):
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same_images(pipe, model, num_steps, monkeypatch):
    """Called without a size or anything else."""
    return stock.assert_same(pipe, model, monkeypatch, {"num_inference_steps": num_steps, "guidance_scale": 0})


@pytest.mark.parametrize(
    ("name", "flags", "times"),
    [
        ("one", "", [399]),
        ("four", "--sample-num-steps 4", [999, 749, 499, 249]),
        ("three", "--sample-num-steps 3", [998, 665, 332]),
        ("lora", "--use-lora-gen", [399]),
        ("lora4", "--use-lora-gen --sample-num-steps 4", [999, 749, 499, 249]),
    ],
)
def test_stock_diffusers_makes_the_same_images(runs, tmp_path, monkeypatch, name, flags, times):
    from train_t2i.student import load_student

    run = runs(name, flags)
    model = load_student(str(run))
    folder = export(run, tmp_path / "pipeline")
    recommended = json.loads((folder / "recommended.json").read_text())
    assert recommended["num_inference_steps"] == len(times)
    assert recommended["guidance_scale"] == 0
    pipe = stock_pipeline(folder)
    calls = stock.told(pipe.unet)
    print(name, same_images(pipe, model, len(times), monkeypatch))
    assert [float(call["timestep"]) for call in calls] == times
    teacher, exported = model.family.load(torch.float32).state_dict(), stock_state(folder)
    assert teacher.keys() == exported.keys()
    assert any(not torch.equal(teacher[key], exported[key]) for key in teacher), "the generator is the teacher's"


def stock_state(folder):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()


def test_a_lora_on_an_initialised_generator_is_merged_onto_it(runs, tmp_path, monkeypatch):
    from train_t2i.student import load_student

    start = runs("one") / "checkpoints" / "torch_units" / "step-2.pt"
    run = runs("on-top", f"--use-lora-gen --generator-init {start}")
    same_images(stock_pipeline(export(run, tmp_path / "p")), load_student(str(run)), 1, monkeypatch)


def test_another_architecture(tmp_path, sdxl_folder_2, prompts_file, monkeypatch):
    from train_t2i.student import load_student

    run = tiny_runs.train(tmp_path, "b", "--use-lora-gen", model=sdxl_folder_2, prompts=prompts_file)
    same_images(stock_pipeline(export(run, tmp_path / "p")), load_student(str(run)), 1, monkeypatch)


def test_a_fine_tuned_teacher_keeps_its_many_guided_steps(runs, tmp_path, monkeypatch, images_table):
    from train_t2i.student import load_student

    run = runs("sft", f"--data-path-train {images_table} --teacher-num-steps 4 --teacher-cfg 3", "sft")
    model = load_student(str(run))
    ours = model.images(PROMPTS, SEEDS)
    folder = export(run, tmp_path / "p")
    recommended = json.loads((folder / "recommended.json").read_text())
    assert recommended["num_inference_steps"] == 4
    pipe = stock_pipeline(folder)
    from train_t2i.randomness import seeded_noise

    start = seeded_noise(SEEDS, model.latent_shape)
    theirs = pipe(
        PROMPTS, latents=start, num_inference_steps=4, guidance_scale=recommended["guidance_scale"], output_type="pt"
    ).images
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_half_precision(runs, tmp_path):
    folder = export(runs("one"), tmp_path / "half", "--dtype bf16")
    pipe = stock_pipeline(folder, dtype=torch.bfloat16)
    assert pipe.unet.dtype == pipe.vae.dtype == torch.bfloat16
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    full = sum(file.stat().st_size for file in export(runs("one"), tmp_path / "full").rglob("*.safetensors"))
    assert size < 0.6 * full


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weights_are_the_masters_in_the_format_that_is_asked_for(runs, tmp_path, images_table, dtype):
    """Of supervised training in full, in shards whose index stock diffusers follows."""
    from diffusers import UNet2DConditionModel

    run = runs("sft", f"--data-path-train {images_table} --teacher-num-steps 4 --teacher-cfg 3", "sft")
    folder = export(run, tmp_path / "p", f"--dtype {dtype} --max-shard-size 300KB") / "unet"
    weights = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weights.values())) > 1
    assert all((folder / file).stat().st_size < 400_000 for file in weights.values())
    masters = tiny_runs.weights(run, 2)
    loaded = UNet2DConditionModel.from_pretrained(folder, torch_dtype=DTYPES[dtype]).state_dict()
    assert masters.keys() == loaded.keys() == weights.keys()
    for key, master in masters.items():
        assert master.dtype == torch.float32
        assert torch.equal(loaded[key], master.to(DTYPES[dtype])), key


def test_what_was_not_trained_is_the_bases(runs, tmp_path, images_table, sdxl_folder):
    """A checkpoint of some modules holds no more than those."""
    from safetensors.torch import load_file

    run = runs("some", f"--data-path-train {images_table} --trainable-modules mid_block,conv_out", "sft")
    file = "unet/diffusion_pytorch_model.safetensors"
    saved = load_file(export(run, tmp_path / "p", "--dtype bf16") / file)
    masters, base = tiny_runs.weights(run, 2), load_file(sdxl_folder / file)
    assert {key.split(".")[0] for key in masters} == {"mid_block", "conv_out"}
    assert base.keys() == saved.keys()
    for key, tensor in saved.items():
        assert torch.equal(tensor, masters.get(key, base[key]).bfloat16()), key
    assert all(not torch.equal(masters[key], base[key]) for key in masters)


def small_pipeline():
    """Of one network, with a table of whole numbers beside its weights."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    net = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False,
    )  # fmt: skip
    net.register_buffer("table", torch.arange(300))
    return DDPMPipeline(net, DDPMScheduler())


def save(pipe, out, max_shard_size):
    from train_t2i.export.folders import new_folder, seal

    with new_folder(out) as folder:
        pipe.save_pretrained(folder, max_shard_size=max_shard_size)
        seal(pipe.unet, folder / "unet", {})


def test_whole_numbers_stay_whole_numbers(tmp_path):
    from safetensors.torch import load_file

    pipe = small_pipeline()
    pipe.to(torch.bfloat16)
    save(pipe, tmp_path / "p", "10GB")
    table = load_file(tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors")["table"]
    assert table.dtype == torch.int64
    assert torch.equal(table, torch.arange(300))


@pytest.mark.parametrize("damage", ["a value", "a name", "the index", "an end"])
def test_what_is_written_wrong_does_not_get_its_name(tmp_path, monkeypatch, damage):
    from pathlib import Path

    from diffusers import UNet2DModel
    from safetensors.torch import load_file, save_file

    from train_t2i.errors import EXIT_DISK, UserError

    whole = UNet2DModel.save_pretrained

    @functools.wraps(whole)  # the pipeline looks at which options it takes
    def damaged(self, folder, **options):
        whole(self, folder, **options)
        index = Path(folder) / "diffusion_pytorch_model.safetensors.index.json"
        content = json.loads(index.read_text())
        first, last = sorted(set(content["weight_map"].values()))[:2]
        if damage == "the index":
            key = next(k for k, file in content["weight_map"].items() if file == first)
            content["weight_map"][key] = last
            index.write_text(json.dumps(content))
            return
        if damage == "an end":
            (Path(folder) / first).write_bytes((Path(folder) / first).read_bytes()[:-1])
            return
        tensors = load_file(Path(folder) / first)
        key, tensor = next((k, v) for k, v in tensors.items() if v.is_floating_point())
        if damage == "a name":
            tensors[key + ".other"] = tensors.pop(key)
        else:
            tensor.view(-1)[0] += 1
        save_file(tensors, Path(folder) / first, metadata={"format": "pt"})

    monkeypatch.setattr(UNet2DModel, "save_pretrained", damaged)
    with pytest.raises(UserError, match="not written as they are") as caught:
        save(small_pipeline(), tmp_path / "p", "4KB")
    assert caught.value.exit_code == EXIT_DISK
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["80", "big", "0GB", "-1GB", "5 PB"])
def test_a_size_that_is_none(runs, capsys, size):
    assert f"--max-shard-size {size}: not a size" in refused(capsys, runs("one"), f"--max-shard-size={size}")


def test_the_default_folder_is_in_the_run(runs):
    run = runs("one")
    assert main(["export", "--run", str(run), "--step", "1"]) == 0
    assert (run / "pipeline" / "step-1" / "model_index.json").is_file()


# -- mistakes --------------------------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    assert main(["export", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_mistakes_are_one_line(runs, tmp_path, capsys):
    run = runs("one")
    assert "available: pipeline" in refused(capsys, run, "--to", "onnx")
    assert "already there" in refused(capsys, run, "--out", tmp_path)
    assert "0 runs" in refused(capsys)
    assert "2 runs" in refused(capsys, run, run)
    assert "it has: 2, 1, or latest" in refused(capsys, run, "--step", "9")
    assert "no checkpoint" in refused(capsys, tmp_path / "nothing")


def test_a_shifted_grid_is_refused_rather_than_exported_wrong(runs, tmp_path, capsys):
    run = runs("shifted", "--sample-num-steps 4 --shift 3")
    assert "cannot be said in a scheduler's config" in refused(capsys, run, "--out", tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_nothing(runs, tmp_path, capsys, monkeypatch):
    from diffusers import StableDiffusionXLPipeline

    def full(self, folder, **options):
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StableDiffusionXLPipeline, "save_pretrained", full)
    assert main(["export", str(runs("one")), "--out", str(tmp_path / "p")]) == 5
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

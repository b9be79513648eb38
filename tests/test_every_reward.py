"""What every reward promises: gradients, precision, cheap paths, and one line for whatever is wrong with its files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from reward_towers import PROMPTS, random_images

from rewards import REWARDS, Choices, Reward, RewardError, find
from rewards.frozen import FrozenReward
from rewards.micro_batches import MicroBatched
from rewards.random_weights import filled, write
from rewards.weights import read_state


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("rewards")
    return {name: write(name, root / name) for name in REWARDS}


@pytest.fixture(scope="module")
def built(folders: dict[str, Path]) -> dict[str, FrozenReward]:
    return {name: REWARDS[name](folder) for name, folder in folders.items()}  # type: ignore[misc]


# --- scores and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("size", [(32, 32), (48, 30)])
def test_gradient_equals_finite_differences(name: str, size: tuple[int, int], folders: dict[str, Path]) -> None:
    reward: FrozenReward = REWARDS[name](folders[name], dtype=torch.float64)  # type: ignore[assignment]
    images = random_images(2, *size, dtype=torch.float64).requires_grad_()
    weights = torch.tensor([1.0, -0.5], dtype=torch.float64)  # a row's gradient must come from its own score
    (grad,) = torch.autograd.grad((weights * reward.scores(images, PROMPTS[:2])).sum(), images)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        up, down = (weights @ reward.scores(images + h * direction, PROMPTS[:2]) for h in (1e-5, -1e-5))
    torch.testing.assert_close((grad * direction).sum(), (up - down) / 2e-5, rtol=1e-6, atol=1e-8)
    assert grad.abs().max() > 1e-4


@pytest.mark.parametrize("name", REWARDS)
def test_it_is_a_frozen_reward_of_its_name(name: str, built: dict[str, FrozenReward]) -> None:
    reward = built[name]
    assert isinstance(reward, Reward)
    assert (reward.name, reward.differentiable) == (name, True)
    images = random_images(3, 40, 32).requires_grad_()
    scores = reward(images, PROMPTS[:3], tick=5)
    assert (scores.shape, scores.dtype) == ((3,), torch.float32)
    scores.sum().backward()
    parameters = list(reward.model.parameters())  # type: ignore[attr-defined]
    assert all(not p.requires_grad and p.grad is None and not p.is_meta for p in parameters)
    assert reward(images[:0], []).shape == (0,)
    for wrong in (["a"], "abc"):
        with pytest.raises(ValueError, match="3 images need as many prompts"):
            reward(images, wrong)
    with pytest.raises(ValueError, match="3, H, W"):
        reward(images[:, :1], PROMPTS[:3])


@pytest.mark.parametrize("name", REWARDS)
def test_a_score_depends_on_its_own_image_and_prompt_alone(name: str, built: dict[str, FrozenReward]) -> None:
    images = random_images(5, 40, 40)
    together = built[name](images, PROMPTS)
    alone = torch.cat([built[name](images[i : i + 1], [PROMPTS[i]]) for i in range(5)])
    torch.testing.assert_close(together, alone, atol=2e-6, rtol=1e-5)
    others = built[name](images, PROMPTS[::-1])
    assert torch.equal(others, together) != REWARDS[name].reads_prompts


@pytest.mark.parametrize("name", REWARDS)
def test_half_precision_scores_are_fp32_and_near(
    name: str, folders: dict[str, Path], built: dict[str, FrozenReward]
) -> None:
    images = random_images(4, 40, 24).requires_grad_()
    scores = REWARDS[name](folders[name], dtype=torch.bfloat16)(images, PROMPTS[:4])
    assert scores.dtype == torch.float32
    tolerance = 2.0 if name == "pickscore" else 0.02  # a hundred times the cosine
    torch.testing.assert_close(scores, built[name](images, PROMPTS[:4]), atol=tolerance, rtol=0.05)
    (grad,) = torch.autograd.grad(scores.sum(), images)
    assert grad.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = built[name](images, PROMPTS[:4])
    assert torch.equal(inside, built[name](images, PROMPTS[:4]))


@pytest.mark.parametrize("name", REWARDS)
def test_cheap_paths_keep_scores_and_gradients(
    name: str, folders: dict[str, Path], built: dict[str, FrozenReward]
) -> None:
    """Micro-batches (the last one smaller) and checkpointing, against the plain call."""
    plain, images = built[name], random_images(5, 48, 40).requires_grad_()
    checkpointed = REWARDS[name](folders[name], checkpointing=True)
    factors = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0])
    expected = plain(images, PROMPTS)
    (gradient,) = torch.autograd.grad((factors * expected).sum(), images)
    for cheap in (MicroBatched(plain, 2), checkpointed, MicroBatched(checkpointed, 2)):
        scores = cheap(images, PROMPTS)
        torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-5)
        assert scores.requires_grad
        (found,) = torch.autograd.grad((factors * scores).sum(), images)
        torch.testing.assert_close(found, gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-4)
    with torch.no_grad():
        assert not MicroBatched(plain, 2)(images, PROMPTS).requires_grad


def test_micro_batches_hold_the_activations_of_one(built: dict[str, FrozenReward]) -> None:
    """What autograd keeps for the backward pass: one gradient the size of the images, and no more."""
    images, kept = random_images(8, 40, 40).requires_grad_(), []
    scores = MicroBatched(built["hpsv2"], 2)(images, [PROMPTS[0]] * 8)
    assert [tensor.shape[0] for tensor in scores.grad_fn.saved_tensors] == [2] * 4  # type: ignore[union-attr]
    assert sum(tensor.numel() for tensor in scores.grad_fn.saved_tensors) == images.numel()  # type: ignore[union-attr]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        built["hpsv2"](images, [PROMPTS[0]] * 8)
    assert sum(kept) > 5 * images.numel()


@pytest.mark.parametrize(("first", "second"), [("hpsv2", "pickscore"), ("pickscore", "hpsv2")])
def test_rewards_of_one_file_share_their_tower(first: str, second: str, folders: dict[str, Path]) -> None:
    """Each keeps its own preprocessing and scale; a file that changed is read again."""
    one, two = (REWARDS[name](folders["pickscore"]) for name in (first, second))
    assert one.model is two.model  # type: ignore[attr-defined]
    images = random_images(1, 40, 56)
    assert one(images, PROMPTS[:1]) != two(images, PROMPTS[:1])
    assert REWARDS[first](folders["pickscore"], dtype=torch.float64).model is not one.model  # type: ignore[attr-defined]
    os.utime(folders["pickscore"] / "model.safetensors")
    assert REWARDS[first](folders["pickscore"]).model is not one.model  # type: ignore[attr-defined]


def test_choices_change_the_score_and_are_told(folders: dict[str, Path]) -> None:
    images, prompt = random_images(1, 40, 56), PROMPTS[:1]
    official = REWARDS["hpsv2"](folders["hpsv2"])(images, prompt)
    told = {
        Choices(antialias=False): "not antialiased",
        Choices(resize_mode="squash"): "squash",
        Choices(resize_mode="shortest"): "shortest",
        Choices(quick_gelu=True): "QuickGELU",
        Choices(logit_scale=True): "cosine x exp(logit_scale)",
    }
    scores = [REWARDS["hpsv2"](folders["hpsv2"], choices=choices)(images, prompt) for choices in told]
    assert torch.cat([official, *scores]).unique().numel() == 6
    torch.testing.assert_close(scores[-1], 100 * official, rtol=1e-5, atol=0)
    for choices, words in told.items():
        assert words in str(REWARDS["hpsv2"].inspect(folders["hpsv2"], choices)).split(": ", 1)[1].split(", ")
    for name, choices, field in (
        ("imagereward", Choices(quick_gelu=True), "quick_gelu"),
        ("aesthetic", Choices(logit_scale=False), "logit_scale"),
    ):
        with pytest.raises(RewardError, match=f"{name} has no {field} to choose"):
            REWARDS[name](folders[name], choices=choices)


@pytest.mark.parametrize(
    ("file", "version"),
    [
        ("HPS_v2.1_compressed.pt", "v2.1"),
        ("HPS_v2_compressed.pt", "v2.0"),
        ("hps_v2_1.pt", "v2.1"),
        ("mine.pt", "v2.0 or v2.1"),
    ],
)
def test_hpsv2_tells_its_version_by_the_files_name(
    file: str, version: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    state = read_state(folders["hpsv2"] / "open_clip_model.safetensors")
    torch.save({"state_dict": state}, tmp_path / file)
    (tmp_path / "open_clip_config.json").write_bytes((folders["hpsv2"] / "open_clip_config.json").read_bytes())
    assert REWARDS["hpsv2"].inspect(tmp_path).choices["version"].startswith(version)


# --- files -----------------------------------------------------------------------------------------------------------


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return os.mkdir, (str(self.canary),)


FILES = {
    "clip": ["open_clip_model.safetensors"],
    "hpsv2": ["open_clip_model.safetensors"],
    "pickscore": ["model.safetensors"],
    "imagereward": ["ImageReward.pt"],
    "aesthetic": ["model.safetensors", "sac+logos+ava1-l14-linearMSE.pth"],
}
DAMAGES = {  # what the message must say
    "truncated": "truncated or damaged|is not ImageReward",
    "zeros": "filled with zeros",
    "web page": "is a web page",
    "code": "nothing in it was run",
    "another model": "no tensor|does not belong|is not ImageReward|holds 0 heads",
    "one tensor too few": "no tensor|is not ImageReward",
    "one tensor too many": "does not belong",
    "nan": "NaN or infinity",
    "hole": "nothing but zeros",
    "flipped bit": "has not the sha256",
}


def damage(kind: str, file: Path, canary: Path) -> None:
    good, state = file.read_bytes(), read_state(file)
    file.unlink()  # the tensors of safetensors are mapped from it
    last = max(name for name in state if state[name].ndim == 2)
    if kind == "truncated":
        file.write_bytes(good[: len(good) // 2])
    elif kind == "zeros":
        file.write_bytes(bytes(len(good)))
    elif kind == "web page":
        file.write_bytes(b"<!DOCTYPE html><html><title>Sign in</title></html>")
    elif kind == "code":
        torch.save({**state, last: Payload(canary)}, file)
    elif kind == "another model":
        torch.save(filled({"block.weight": torch.empty(8, 8), "block.bias": torch.empty(8)}), file)
    elif kind == "one tensor too few":
        torch.save({name: tensor for name, tensor in state.items() if name != last}, file)
    elif kind == "one tensor too many":
        torch.save({**state, "extra.weight": torch.ones(2, 2)}, file)
    elif kind == "nan":
        torch.save({**state, last: torch.full_like(state[last], float("nan"))}, file)
    elif kind == "hole":
        torch.save({**state, last: torch.zeros_like(state[last])}, file)
    elif kind == "flipped bit":
        middle = len(good) // 2
        file.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
    else:
        raise AssertionError(kind)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES.items() for file in files])
def test_damaged_weights_give_one_line(name: str, file: str, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write(name, folder)
    given = [*REWARDS[name].inspect(folder).files]
    assert str(folder / file) in given
    digests = [sha256(path) for path in given]
    REWARDS[name](folder, sha256=digests)
    damage(kind, folder / file, tmp_path / "canary")
    if kind not in ("nan", "hole", "flipped bit"):  # which show in the values alone
        with pytest.raises(RewardError, match=DAMAGES[kind]):
            REWARDS[name].inspect(folder)
    with pytest.raises(RewardError, match=DAMAGES[kind]) as caught:
        REWARDS[name](folder, sha256=digests if kind == "flipped bit" else ())
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(caught.value.hint) > 10
    assert caught.value.__cause__ is None
    assert not (tmp_path / "canary").exists()


def sha256(path: str) -> str:
    import hashlib

    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# --- a function of one's own -----------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_rewards.py").write_text(
        "def bright(images, prompts):\n    return images.mean((1, 2, 3)).double()\n"
        "def hard(images, prompts):\n    return (images > 0.5).float().mean((1, 2, 3))\n"
        "def wrong(images, prompts):\n    return images.mean()\n"
        "number = 3\n"
    )
    (tmp_path / "broken_rewards.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "own_rewards"


def test_a_function_of_ones_own_is_a_reward(module: str) -> None:
    reward = find(f"{module}:bright")(None)
    assert isinstance(reward, Reward)
    images = random_images(3, 8, 8).requires_grad_()
    scores = reward(images, ["a", "b", "c"])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, images.mean((1, 2, 3)))
    (grad,) = torch.autograd.grad(MicroBatched(reward, 2)(images, ["a", "b", "c"]).sum(), images)
    torch.testing.assert_close(grad, torch.full_like(images, 1 / 192))
    assert "function" in str(find(f"{module}:bright").inspect(None))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pikscore", "is no reward; the rewards are clip, hpsv2"),
        (":bright", "is not module:function"),
        ("own_rewards:absent", "cannot be imported .AttributeError"),
        ("no_such_module_x:f", "cannot be imported .ModuleNotFoundError"),
        ("broken_rewards:f", "cannot be imported .ModuleNotFoundError"),
        ("own_rewards:number", "is not a function"),
        ("own_rewards:wrong", r"returned \(\) for 2 images"),
        ("own_rewards:hard", "without a gradient"),
    ],
)
def test_a_wrong_function_gives_one_line(name: str, message: str, module: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        find(name)(None)(random_images(2, 8, 8).requires_grad_(), ["a", "b"])
    assert "\n" not in str(caught.value)


def test_weights_are_given_where_they_are_needed(module: str) -> None:
    with pytest.raises(RewardError, match="takes no weights"):
        find(f"{module}:bright")("file.pt")
    with pytest.raises(RewardError, match="needs weights"):
        find("clip")(None)
    assert torch.isfinite(find(f"{module}:hard")(None)(random_images(2, 8, 8), ["a", "b"])).all()

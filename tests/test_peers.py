"""Which of torch's errors mean that another process is gone.  Real ones are in test_lost.py and test_network.py."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from train_t2i.errors import EXIT_LOST, UserError
from train_t2i.peers import told_when_lost

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] "
LOST = {
    GLOO + "Connection closed by peer [10.0.0.2]:42660. This is typically caused by a crash. GLHF!": (
        RuntimeError,
        r"lost another process at 10\.0\.0\.2 \(this is rank 3 on \S+\): Connection closed by peer \[10\.0\.0\.2\]:42660 \(the first error",
    ),
    "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv": (
        RuntimeError,
        r"lost another process \(this is rank 3 on \S+\): Timed out waiting 1800000ms for recv",
    ),
    "The client socket has timed out after 3000ms while trying to connect to (10.0.0.1, 29500).": (
        dist.DistNetworkError,
        r"while trying to connect to \(10\.0\.0\.1, 29500\)",
    ),
    "NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was a network error, NCCL version 2.2": (
        dist.DistBackendError,
        r"remote process exited or there was a network error",
    ),
}
OURS = {
    "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)": RuntimeError,
    "[enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes. 8 vs 4": RuntimeError,
    "NCCL error in: init.cpp:1, invalid usage\nDuplicate GPU detected : rank 0 and rank 1": dist.DistBackendError,
}


@pytest.mark.parametrize("text", LOST)
def test_a_lost_process_is_one_line(text, monkeypatch):
    kind, line = LOST[text]
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError, match=line) as error, told_when_lost():
        raise kind(text)
    assert error.value.exit_code == EXIT_LOST


@pytest.mark.parametrize("text", OURS)
def test_a_mistake_in_the_program_keeps_its_traceback(text):
    with pytest.raises(RuntimeError) as error, told_when_lost():
        raise OURS[text](text)
    assert not isinstance(error.value, UserError)

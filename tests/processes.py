"""Two processes that talk to one another by gloo, as ``torchrun`` starts them."""

import os
from contextlib import contextmanager

import torch


@contextmanager
def one_of_two(rank, directory):
    """This process as one of two: a Trainer then starts none of its own. They meet at a file."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }  # fmt: skip
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/init", rank=rank, world_size=2)
    yield
    torch.distributed.destroy_process_group()

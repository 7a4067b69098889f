"""Threads that measure at once get what each would get alone, and leave nothing behind."""

import threading

import torch
from cases import cnn, images

import lie_metric as lm
from lie_metric.running import isolated


def process_state():
    return (
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.compiler.is_compiling(),
        torch._dynamo.eval_frame._stance.stance,
        torch.backends.mkldnn.is_available(),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
    )


def test_four_threads_at_once():
    shared, own = cnn().train(), [cnn().train() for _ in range(2)]
    models = [shared, shared, *own]
    wanted = lm.lie_derivative(cnn(), images(2, 8), "rotation")["rotation"].detach()
    before, found, start = process_state(), {}, threading.Barrier(len(models))

    def measure(index):
        start.wait()
        for turn in range(3):
            with torch.no_grad():
                found[index, turn] = lm.lie_derivative(models[index], images(2, 8), "rotation")["rotation"]

    threads = [threading.Thread(target=measure, args=(index,)) for index in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert len(found) == 12
    for value in found.values():
        torch.testing.assert_close(value, wanted)
    assert process_state() == before
    assert all(module.training for model in models for module in model.modules())


def test_one_thread_may_enter_again():
    model = cnn().train()
    with isolated(model):
        with isolated(model):
            assert not model.training
        assert not model.training
    assert model.training


def test_a_thread_that_fails_lets_the_others_in():
    def fail():
        try:
            with isolated(None):
                raise RuntimeError("planted")
        except RuntimeError:
            pass

    for _ in range(2):
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    with isolated(None):
        pass

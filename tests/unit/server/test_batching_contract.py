"""The internals of transformers that `server/engine/batching.py` stands on. When one of these fails after an
upgrade, that file is where to look, and nowhere else."""

import ast
import inspect
from pathlib import Path

import pytest
import transformers
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import continuous_api, input_outputs, model_runner
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators.cache_allocator import compute_block_hash
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

SERVER = Path(__file__).parents[3] / "server"


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_the_minor_version_is_the_one_these_internals_were_read_in() -> None:
    assert transformers.__version__.startswith("5.23.")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (PagedAttentionCache.search_prefix_match, ["self", "request_id", "prompt_ids"]),
        (PagedAttentionCache.mark_complete_blocks, ["self", "state", "complete_blocks"]),
        (PagedAttentionCache.update, ["self", "key_states", "value_states", "layer_idx", "kwargs"]),
        (FIFOScheduler.clear_cancelled_requests, ["self"]),
        (FIFOScheduler.__init__, ["self", "cache", "safety_margin", "max_requests_per_batch"]),
        (model_runner.ModelRunner.compute_batch, ["self", "model", "batch_data"]),
        (model_runner.ModelRunner._sample, ["self", "scores", "output_ids"]),
        (
            model_runner.ModelRunner._forward_process_and_sample,
            ["self", "model", "batch_data", "carry_over_ids", "prev_output_ids", "output_ids"],
        ),
        (continuous_api.ContinuousBatchProcessor._generation_step, ["self", "model"]),
        (continuous_api.ContinuousBatchProcessor.update_batch, ["self"]),
        (continuous_api.ContinuousBatchProcessor.handle_batch_error, ["self", "error"]),
        (continuous_api.ContinuousBatchingManager._create_batch_processor, ["self"]),
        (continuous_api.ContinuousBatchingManager._run_generation_loop, ["self"]),
        (
            continuous_api.ContinuousBatchingManager.switch_to_cb_friendly_attn,
            ["self", "model", "auto_switch_to_flash"],
        ),
        (continuous_api.OutputRouter.deliver, ["self", "output"]),
        (continuous_api.OutputRouter.deliver_batch, ["self", "outputs"]),
        (input_outputs.ContinuousBatchingIOs.prepare_batch_update, ["self"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_what_is_overridden_or_called_still_looks_the_same(function: object, expected: list[str]) -> None:
    assert parameters(function) == expected


def test_constructors_take_what_they_are_given() -> None:
    for cls, names in {
        PagedAttentionCache: {
            "config",
            "continuous_batching_config",
            "device",
            "distributed_helper",
            "dtype",
            "model_supports_logits_to_keep",
        },
        model_runner.ModelRunner: {
            "logit_processor",
            "cb_config",
            "inputs_and_outputs",
            "cache",
            "do_sample",
            "return_logprobs",
        },
        continuous_api.ContinuousBatchProcessor: {
            "cache",
            "config",
            "generation_config",
            "continuous_batching_config",
            "logit_processor",
            "input_queue",
            "cancel_queue",
            "output_router",
            "background_thread_status",
            "model_device",
            "model_dtype",
            "scheduler",
            "distributed_helper",
        },
        ContinuousBatchingConfig: {
            "page_size",
            "num_blocks",
            "max_batch_tokens",
            "max_requests_per_batch",
            "allow_block_sharing",
            "use_async_batching",
            "use_cuda_graph",
            "seed",
        },
    }.items():
        assert names <= set(parameters(cls)), cls


def test_a_request_in_a_batch_tells_its_id_and_its_tokens() -> None:
    assert {"state", "has_new_token", "complete_blocks", "query_length"} == set(FutureRequestState.__slots__)
    state = RequestState(request_id="r", initial_tokens=[1, 2])
    assert (state.request_id, state.position_offset, state.generated_tokens) == ("r", 0, [])


def test_prefix_hashes_see_tokens_only_and_take_a_salt_above_the_vocabulary() -> None:
    """If this ever sees more than tokens, salting may be done without it; if it takes less, salts would
    collide."""
    assert parameters(compute_block_hash) == ["parent_hash", "tokens"]
    assert compute_block_hash(None, [2**31 - 1, 5]) != compute_block_hash(None, [2**31 - 2, 5])


def test_no_other_file_touches_these_internals() -> None:
    for path in SERVER.rglob("*.py"):
        if path.name == "batching.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            assert "continuous_batching" not in (module or ""), path

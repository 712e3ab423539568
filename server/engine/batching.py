"""The one file that touches the internals of transformers' continuous batching.

What is ours: which adapter rows each request of a step uses, prefix hashes salted with the blend, sampling
with per-request parameters, prompt scores, an acknowledged cancel, and a step that fails only its own
requests. All of it by subclass; `tests/unit/server/test_batching_contract.py` fails when the internals move.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import (
    BackgroundThreadStatus,
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.initialization import update_cb_config_after_cache_creation
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import (
    FutureRequestState,
    GenerationOutput,
    RequestState,
    RequestStatus,
)
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

from loramux.server.engine.attention import PER_REQUEST
from loramux.server.engine.hooks import StepHooks
from loramux.server.engine.sampler import token_score


class SaltedCache(PagedAttentionCache):  # type: ignore[misc]
    """A paged cache whose prefix hashes see the blend and not only the tokens.

    The stock hashes see tokens alone, so two blends with one prompt would share keys and values. Here the
    first token of a salted request is replaced, for hashing only, by a number above the vocabulary that
    stands for (salt, first token). Numbers are never used twice.
    """

    MAX_SALTS = 65536

    def __init__(self, hooks: StepHooks, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._hooks = hooks
        self._salts: OrderedDict[tuple[str, int], int] = OrderedDict()
        self._next_salt = int(self.config.vocab_size)

    def _check_footprint(self, max_batch_tokens: int, num_sectors: int) -> tuple[int, int]:
        # The stock check estimates anew what `server/memory` has shared out before anything was loaded, with
        # another idea of what is free, and ends the stepping thread where the two differ. One budget decides.
        if max_batch_tokens <= 0 or num_sectors <= 0:
            raise ValueError(f"no room for a cache: {max_batch_tokens} tokens a step, {num_sectors} sectors")
        return max_batch_tokens, num_sectors

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        if not self._hooks.may_share(request_id):
            return 0
        return int(super().search_prefix_match(request_id, self._salted(request_id, prompt_ids)))

    def mark_complete_blocks(self, state: RequestState, complete_blocks: dict[str, int]) -> None:
        # The stock form leaves finished requests out, for the sake of asynchronous batching. Here their
        # blocks are still theirs at this point, and a request of a single step should leave its prefix behind
        # too.
        if not self.allow_block_sharing or not complete_blocks:
            return
        tokens = self._salted(state.request_id, state.initial_tokens + state.generated_tokens)
        for name, count in complete_blocks.items():
            self.cache_allocators[name].mark_complete_blocks(state.request_id, tokens, count)

    def _salted(self, request_id: str, tokens: list[int]) -> list[int]:
        salt = self._hooks.salt(request_id)
        if salt is None or not tokens:
            return tokens
        key = (salt, tokens[0])
        number = self._salts.get(key)
        if number is None:
            number = self._salts[key] = self._next_salt
            self._next_salt += 1
            if len(self._salts) > self.MAX_SALTS:
                self._salts.popitem(last=False)
        else:
            self._salts.move_to_end(key)
        return [number, *tokens[1:]]


class AcknowledgingScheduler(FIFOScheduler):  # type: ignore[misc]
    """Says when a cancelled request can no longer be part of a step."""

    def __init__(self, hooks: StepHooks, **kwargs: Any) -> None:
        self._hooks = hooks
        super().__init__(**kwargs)

    def clear_cancelled_requests(self) -> list[RequestState]:
        asked = set(self._requests_to_cancel)
        states: list[RequestState] = super().clear_cancelled_requests()
        if asked:
            self._hooks.cancelled(asked)
        return states


class HookedRunner(ModelRunner):  # type: ignore[misc]
    """Runs the forward pass with the step's adapters and hands the logits to the hooks."""

    def __init__(self, hooks: StepHooks, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._hooks = hooks

    @property
    def _batch(self) -> list[FutureRequestState]:
        batch: list[FutureRequestState] = self.inputs_and_outputs.requests_in_batch
        return batch

    def compute_batch(self, model: torch.nn.Module, batch_data: dict[str, Any]) -> None:
        batch = self._batch
        self._hooks.before_forward(
            [(future.state.request_id, future.query_length) for future in batch],
            [future.state.position_offset - future.query_length for future in batch],
        )
        try:
            super().compute_batch(model, batch_data)
        finally:
            self._hooks.after_forward()

    def _forward_process_and_sample(
        self,
        model: torch.nn.Module,
        batch_data: dict[str, Any],
        carry_over_ids: Tensor,
        prev_output_ids: Tensor,
        output_ids: Tensor,
    ) -> None:
        scored = [self._hooks.scored_prompt(future.state.request_id) for future in self._batch]
        if not any(scored):
            super()._forward_process_and_sample(
                model, batch_data, carry_over_ids, prev_output_ids, output_ids
            )
            return
        # Log-probabilities of prompt tokens need the logits of every prompt position, not of the last ones
        # only.
        batch_data.pop("logits_to_keep", None)
        logits = model(**batch_data).logits[0]  # [tokens, vocabulary]
        start = 0
        for future, prompt in zip(self._batch, scored, strict=True):
            if prompt is not None:
                self._score(future, prompt, logits[start : start + future.query_length])
            start += future.query_length
        self._sample(logits[batch_data["logits_indices"]].float().unsqueeze(0), output_ids)

    def _score(self, future: FutureRequestState, prompt: tuple[tuple[int, ...], int], logits: Tensor) -> None:
        tokens, alternatives = prompt
        first = future.state.position_offset - future.query_length
        scores = [
            token_score(row.float(), tokens[position + 1], alternatives)
            for position, row in enumerate(logits, start=first)
            if position + 1 < len(tokens)
        ]
        self._hooks.add_prompt_scores(future.state.request_id, scores)

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        request_ids = [future.state.request_id for future in self._batch if future.has_new_token]
        if not request_ids:
            return
        tokens = self._hooks.sample(request_ids, scores[0, : len(request_ids)])
        output_ids[0, : len(tokens)] = torch.tensor(tokens, dtype=output_ids.dtype, device=output_ids.device)


class IsolatingProcessor(ContinuousBatchProcessor):  # type: ignore[misc]
    """A step that raises fails the requests of that step; the loop and all other requests go on."""

    def __init__(self, hooks: StepHooks, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._hooks = hooks
        self._step_failed = False
        self.model_runner = HookedRunner(
            hooks,
            logit_processor=self.logit_processor,
            cb_config=self.cb_config,
            cache=self.cache,
            inputs_and_outputs=self.inputs_and_outputs,
            do_sample=self.do_sample,
            return_logprobs=self.return_logprobs,
        )

    def _generation_step(self, model: torch.nn.Module) -> None:
        try:
            super()._generation_step(model)
        except Exception as error:
            # Whatever it was (out of memory, a shape a custom layer did not expect), it concerns this batch.
            self.handle_batch_error(error)
            self._step_failed = True

    def update_batch(self) -> None:
        if self._step_failed:
            self._step_failed = False
            return
        batch = list(self.inputs_and_outputs.requests_in_batch)
        super().update_batch()
        decode = sum(future.query_length == 1 for future in batch)
        self._hooks.stepped(sum(future.query_length for future in batch) - decode, decode)


class HookedOutput(OutputRouter):  # type: ignore[misc]
    """Results reach their owner through the hooks as they are sampled; only failures pass through here."""

    def __init__(self, hooks: StepHooks) -> None:
        super().__init__()
        self._hooks = hooks

    def deliver(self, output: GenerationOutput) -> None:
        if output.status == RequestStatus.FAILED:
            self._hooks.failed(output.request_id, output.error or "the step failed")

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self.deliver(output)


class Batching(ContinuousBatchingManager):  # type: ignore[misc]
    """The stepping thread: submit and cancel from any thread, hooks are called on its own."""

    def __init__(
        self,
        model: PreTrainedModel,
        hooks: StepHooks,
        *,
        page_size: int,
        pages: int,
        max_batch_tokens: int,
        max_running: int,
        prefix_sharing: bool,
        on_death: Callable[[BaseException | None], None],
    ) -> None:
        config = ContinuousBatchingConfig(
            page_size=page_size,
            num_blocks=pages,
            max_batch_tokens=max_batch_tokens,
            max_requests_per_batch=max_running,
            allow_block_sharing=prefix_sharing,
            # Sampling is per request and happens in Python, so a step cannot be replayed from a graph as a
            # whole and the next one cannot start before its tokens are known.
            use_async_batching=False,
            use_cuda_graph=False,
            seed=0,
        )
        super().__init__(model, GenerationConfig(do_sample=False, eos_token_id=-1), config)
        self._hooks = hooks
        self._on_death = on_death
        self._generation_thread: threading.Thread | None = None
        self.output_router = HookedOutput(hooks)

    def switch_to_cb_friendly_attn(self, model: PreTrainedModel, auto_switch_to_flash: bool = True) -> None:
        if model.device.type != "cpu":
            super().switch_to_cb_friendly_attn(model, auto_switch_to_flash)
            return
        self._original_attn_impl = model.config._attn_implementation
        model.set_attn_implementation(PER_REQUEST)

    def start(self) -> None:
        self.background_thread_status.clear()
        # A daemon: a process that ends without a proper stop must not hang on this thread.
        self._generation_thread = threading.Thread(
            target=self._run_generation_loop, name="loramux-engine", daemon=True
        )
        self._generation_thread.start()

    def submit(
        self, request_id: str, prompt: Sequence[int], *, max_tokens: int, stop_ids: Sequence[int]
    ) -> None:
        """Queue a request; a `max_tokens` of 0 still takes one step.

        Raises:
            RuntimeError: the stepping thread is stopping or dead.
        """
        accepted = self.add_request(
            list(prompt), request_id, max_new_tokens=max(1, max_tokens), eos_token_id=list(stop_ids)
        )
        if accepted is None:
            raise RuntimeError(self.background_thread_status.can_accept_new_requests() or "not accepted")

    def shutdown(self, timeout: float) -> None:
        """Let what runs finish for `timeout` seconds, then fail the rest. Blocks until the thread has
        ended."""
        thread: threading.Thread | None = self._generation_thread
        if thread is None:
            return
        for status, patience in (
            (BackgroundThreadStatus.FLUSH_AND_STOP, timeout),
            (BackgroundThreadStatus.HARD_STOP, None),
        ):
            self.background_thread_status.request_stop(status, self.distributed_helper.global_rank)
            self._wake_up_loop.set()
            thread.join(patience)
            if not thread.is_alive():
                break
        if self._original_attn_impl is not None:
            self.model.set_attn_implementation(self._original_attn_impl)

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache that is not free, 0 to 1; cached prefixes count as free."""
        processor = self.batch_processor
        if processor is None:
            return 0.0
        cache = processor.cache
        cached = sum(
            len(allocator.ledger.cached_blocks) * allocator.bytes_per_block
            for allocator in cache.cache_allocators.values()
        )
        free = cache.compute_free_capacity(relative=False) + cached
        return float(1 - free / (cache.num_sectors * cache.bytes_per_sector))

    def _run_generation_loop(self) -> None:
        try:
            super()._run_generation_loop()
        finally:
            self._on_death(self.background_thread_status.fatal_error)

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        if isinstance(self.batch_processor, ContinuousBatchProcessor):
            self.batch_processor.reset()
            return self.batch_processor
        config = self.continuous_batching_config
        text_config = self.model.config.get_text_config()
        cache = SaltedCache(
            self._hooks,
            config=text_config,
            continuous_batching_config=config,
            device=self.model.device,
            distributed_helper=self.distributed_helper,
            dtype=self.model.dtype,
            model_supports_logits_to_keep=self.model._supports_logits_to_keep(),
        )
        update_cb_config_after_cache_creation(
            cb_config=config, num_blocks=cache.num_blocks, max_batch_tokens=cache.max_batch_tokens
        )
        scheduler = AcknowledgingScheduler(
            self._hooks,
            cache=cache,
            safety_margin=None,
            max_requests_per_batch=config.max_requests_per_batch,
        )
        return IsolatingProcessor(
            self._hooks,
            cache=cache,
            config=text_config,
            generation_config=self.generation_config,
            continuous_batching_config=config,
            logit_processor=self.logit_processor,
            input_queue=self.input_queue,
            cancel_queue=self.cancel_queue,
            output_router=self.output_router,
            background_thread_status=self.background_thread_status,
            model_device=self.model.device,
            model_dtype=self.model.dtype,
            scheduler=scheduler,
            distributed_helper=self.distributed_helper,
        )

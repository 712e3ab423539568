"""From wire requests to an `Ask`: tokenizing, the context, and what depends on the vocabulary."""

import asyncio
from collections.abc import Sequence

from loramux.adapters.blend import METHOD_OPTIONS
from loramux.server.ask import Ask, Prompt
from loramux.server.catalog import Catalog, Kind
from loramux.server.engine.grammars import Grammars
from loramux.server.engine.protocol import GrammarError, Sampling
from loramux.server.errors import RequestError
from loramux.server.text.grammar import GrammarSyntaxError, json_grammar
from loramux.server.text.prompts import Prompts, Turn
from loramux.server.toolkit import Toolkit, ToolUse
from loramux.server.wire.chat import ChatRequest
from loramux.server.wire.completions import CompletionRequest
from loramux.server.wire.generation import GenerationFields
from loramux.server.wire.responses import ResponseRequest
from loramux.server.wire.structured import Structure

COMPLETION_TOKENS = 16


class Intake:
    """Checks what the wire models cannot know."""

    def __init__(self, prompts: Prompts, catalog: Catalog, grammars: Grammars, toolkit: Toolkit) -> None:
        self._prompts = prompts
        self._catalog = catalog
        self._grammars = grammars
        self._toolkit = toolkit

    async def chat(self, request: ChatRequest) -> Ask:
        """Raises `RequestError` when the model, a token id, the template or the context does not fit."""
        self._check(request)
        tools = self._toolkit.use(request.offer)
        variables = self._prompts.variables(request.chat_template_kwargs or {}, request.reasoning_effort)
        turns = [message.turn for message in request.messages]
        offered = () if tools is None else tools.tools
        tokens = await self._prompts.chat(turns, variables=variables, tools=offered)
        asked = request.max_completion_tokens or request.max_tokens
        text = routing_text(turns)
        limit = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        prompt = Prompt(text, tokens, self._prompts.room(len(tokens), asked, "messages", limit=limit))
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        grammar = await self._grammar(request.structure, tools)
        return self._ask(request, (prompt,), text, logprobs, grammar=grammar, tools=tools)

    async def response(self, request: ResponseRequest) -> Ask:
        """Raises `RequestError` when the model, a token id, the template or the context does not fit."""
        self._check(request)
        tools = self._toolkit.use(request.offer)
        effort = None if request.reasoning is None else request.reasoning.effort
        variables = self._prompts.variables({}, effort, "reasoning.effort")
        turns = request.turns
        offered = () if tools is None else tools.tools
        tokens = await self._prompts.chat(turns, variables=variables, tools=offered, param="input")
        room = self._prompts.room(len(tokens), request.max_output_tokens, "input", limit="max_output_tokens")
        text = routing_text(turns)
        logprobs = (request.top_logprobs or 0) if request.logprobs_wanted else None
        grammar = await self._grammar(request.structure, tools)
        prompt = Prompt(text, tokens, room)
        return self._ask(request, (prompt,), text, logprobs, grammar=grammar, tools=tools)

    async def completion(self, request: CompletionRequest) -> Ask:
        """Raises `RequestError` when the model, a token id or the context does not fit."""
        self._check(request)
        prompts = []
        for given in request.prompt:
            if isinstance(given, str):
                text, tokens = given, await self._prompts.text(given)
            else:
                self._prompts.check_ids(given, "prompt")
                text, tokens = await self._prompts.detokenize(given), given
            if not tokens:
                raise RequestError("prompt has no tokens", param="prompt", code="invalid_value")
            room = self._prompts.room(len(tokens), request.max_tokens, "prompt", default=COMPLETION_TOKENS)
            prompts.append(Prompt(text, tokens, room))
        return self._ask(
            request,
            tuple(prompts),
            "\n".join(p.text for p in prompts),
            request.logprobs,
            request.echo,
            await self._grammar(request.structure),
        )

    async def _grammar(self, structure: Structure | None, tools: ToolUse | None = None) -> str | None:
        """The grammar of what the answer has to look like, or has to call; known to compile."""
        if structure is None and (tools is None or not tools.must):
            return None
        param = "tools" if structure is None else structure.param
        try:
            if tools is not None:
                for number, schema in enumerate(tools.schemas):
                    param = tools.schemas_at.format(number)
                    await self._grammars.check(json_grammar(schema))
            param = "tools" if structure is None else structure.param
            # In a thread: a written grammar is translated by a parser in Python.
            grammar = await asyncio.to_thread(self._toolkit.grammar, tools, structure)
            if grammar is not None:
                await self._grammars.check(grammar)
        except (GrammarSyntaxError, GrammarError) as error:
            raise RequestError(f"{param}: {error}", param=param, code="invalid_grammar") from None
        return grammar

    def _check(self, request: GenerationFields) -> None:
        kind = self._catalog.resolve(request.model)
        if request.lora is not None and kind in (Kind.EXPERT, Kind.SPARSE):
            what = "an expert" if kind is Kind.EXPERT else "a sparse model"
            raise RequestError(f"lora cannot be combined with a model that is {what}; use auto or the base",
                               param="lora", code="invalid_value")  # fmt: skip
        if request.routing is not None and kind is not Kind.AUTO:
            raise RequestError("routing needs model auto", param="routing", code="invalid_value")
        if request.routing is not None and request.routing.merge not in (None, *METHOD_OPTIONS):
            raise RequestError(
                f"routing.merge: {request.routing.merge!r} is not one of {', '.join(METHOD_OPTIONS)}",
                param="routing.merge",
                code="invalid_value",
            )
        for index, entry in enumerate(request.lora or ()):
            self._catalog.expert(entry.id, param=f"lora[{index}].id")
        self._prompts.check_ids(list(request.logit_bias), "logit_bias")
        self._prompts.check_ids(request.stop_token_ids, "stop_token_ids")

    def _ask(
        self,
        request: GenerationFields,
        prompts: tuple[Prompt, ...],
        text: str,
        logprobs: int | None,
        echo: bool = False,
        grammar: str | None = None,
        tools: ToolUse | None = None,
    ) -> Ask:
        sampling = Sampling(
            max_tokens=0,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=max(0, request.top_k),
            min_p=request.min_p,
            seed=request.seed,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            repetition_penalty=request.repetition_penalty,
            logit_bias=request.logit_bias,
            stop_token_ids=frozenset(request.stop_token_ids),
            ignore_eos=request.ignore_eos,
            logprobs=logprobs,
        )
        return Ask(
            model=request.model,
            prompts=prompts,
            routing_text=text,
            sampling=sampling,
            n=request.n,
            stop=tuple(request.stop),
            lora=tuple((entry.id, entry.scale) for entry in request.lora) if request.lora else None,
            routing=request.routing,
            echo=echo,
            prompt_logprobs=logprobs if echo else None,
            grammar=grammar,
            tools=tools,
            score_end=isinstance(request, CompletionRequest) and logprobs is not None,
        )


def routing_text(turns: Sequence[Turn]) -> str:
    """The last user message: it says what is wanted now. Without one, the last message."""
    for turn in reversed(turns):
        if turn["role"] == "user":
            return str(turn["content"])
    return str(turns[-1]["content"])

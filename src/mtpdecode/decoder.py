"""What people type: `MTPDecoder` and `generate`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import islice, product
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList, StopStringCriteria
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils.logging import tqdm

from .acceptance import Acceptance, acceptance_named
from .assistant import Assistant, AssistantProposer, assistant_for
from .attention import folding
from .cache import CacheLayout, KVCacheManager, RaggedCache
from .compiled import CompiledRound
from .errors import GenerationError
from .frames import with_room
from .head import MTPHead
from .layers import check_attention, layer_plans, layer_windows
from .loading import head_for, load_target, save_together
from .loop import Roles, Round, Step, decode, decode_round
from .metrics import Metrics
from .packing import Packing
from .proposer import Call, DraftSampling, MixedProposer, MTPProposer, NGramProposer, NoDraft, Proposer
from .rehearsal import rehearse
from .request import (
    OURS,
    Request,
    check_inputs,
    check_keywords,
    check_prepared,
    check_seam,
    left_padded,
    request_from,
    seeds_for,
    without_text_types,
)
from .sampling import Sampler
from .schedule import DraftSchedule, ExpectedSpeedup, Trial, schedule_for
from .spec import MTPSpec
from .state import Noise, Purpose
from .target import check_own_code, decoder_of, evaluating, has_own_code, lm_head_of, text_config, training_modules
from .verifier import Verifier
from .vocabulary import DraftVocabulary, draft_ids

CacheFactory = Callable[[CacheLayout, int, int, torch.device], KVCacheManager]
PREFILL_CHUNK = 2048
"""Prompt tokens per prefill forward, unless prefill_chunk_size says otherwise."""


class Chunk(NamedTuple):
    """What one round appended: per row its new tokens, none where the row had finished before."""

    tokens: list[list[int]]


@dataclass
class MTPOutput(GenerateDecoderOnlyOutput):
    """What `generate(return_dict_in_generate=True)` returns: sequences (B, P + n) int64, and the call's metrics."""

    metrics: Metrics | None = None


class Options(NamedTuple):
    """How to speculate; a call of `generate` may replace any of them.

    steady  where nobody asked for a schedule: the K of sampled text with a seed. "auto" goes by the clock, and K decides which of
            the law's texts is written; coupled sampling writes the same one for every K
    """

    schedule: DraftSchedule
    draft_sampling: DraftSampling
    acceptance: str | Acceptance
    seed: int | Sequence[int] | None = None
    steady: DraftSchedule | None = None

    def replaced(self, given: dict[str, Any]) -> Options:
        """With what a call says. Raises GenerationError for a wrong value."""
        said = {name: value for name, value in given.items() if value is not None}
        if "num_speculative_tokens" in said:
            said |= {"schedule": schedule_for(said.pop("num_speculative_tokens")), "steady": None}
        options = self._replace(**said)
        _ = options.rule  # an unknown name is an error now, before anything has begun
        if options.draft_sampling not in ("sample", "greedy"):
            raise GenerationError(f"draft_sampling={options.draft_sampling!r} was asked for; it is 'sample' or 'greedy'.")
        return options

    def settled(self, do_sample: bool) -> Options:
        """With the schedule of one call."""
        if self.steady is None or not do_sample or self.seed is None or self.rule is None:
            return self
        return self._replace(schedule=self.steady)

    @property
    def rule(self) -> Acceptance | None:
        """The acceptance rule; None compares the draft with the target's own draws."""
        return self.acceptance if isinstance(self.acceptance, Acceptance) else acceptance_named(self.acceptance)


HOW_TO_BUILD = (
    *("head", "spec", "assistant", "proposer", "num_speculative_tokens", "draft_sampling", "acceptance", "cache"),
    *("draft_vocabulary", "lookup", "compiled", "packed"),
)
"""The keywords of `MTPDecoder.from_model`."""


class MTPDecoder:
    """Decodes a causal language model with its own MTP head: several tokens per forward pass, the same law.

    target, head, proposer    what it is built from; head is None where the proposer needs none
    assistant                 what drafts instead of a head for Gemma 4, else None
    verifier, cache, metrics  of the last call

    The caches of a call that is over are kept: the next call of as many rows writes into the same memory. `release` lets them go.
    """

    def __init__(self, target: PreTrainedModel, proposer: Proposer, options: Options, cache: CacheFactory) -> None:
        self.target, self.proposer, self.options, self._cache_factory = target, proposer, options, cache
        self.head = proposer.head if isinstance(proposer, MTPProposer) else None
        self.assistant = proposer.assistant if isinstance(proposer, AssistantProposer) else None
        layout = self._layout()  # a layer or an attention that is not ours is an error now, not at the first call
        if has_own_code(target):
            rehearse(target, layout)
        self.step: Step = decode_round
        self.packing = Packing(())
        self._spare: dict[int, KVCacheManager] = {}  # 0: the target's, 1: the head's; whose call is not over are not among them
        self.verifier: Verifier | None = None
        self.cache: KVCacheManager | None = None
        self.metrics: Metrics | None = None

    @classmethod
    def from_model(
        cls,
        target: PreTrainedModel,
        *,
        head: MTPHead | str | os.PathLike[str] | None = None,
        spec: MTPSpec | None = None,
        assistant: Assistant | PreTrainedModel | str | os.PathLike[str] | None = None,
        proposer: Proposer | None = None,
        num_speculative_tokens: int | Literal["auto"] | DraftSchedule | None = None,
        draft_sampling: DraftSampling = "sample",
        acceptance: str | Acceptance = "standard",
        cache: CacheFactory = RaggedCache,
        draft_vocabulary: DraftVocabulary | Tensor | Sequence[int] | int | None = None,
        lookup: NGramProposer | None = None,
        compiled: bool = False,
        packed: bool | None = None,
    ) -> MTPDecoder:
        """Find the target's family, read the head's weights once, build the roles.

        head                    a head in memory, or the folder or repository to read it from; none: the target's own checkpoint
        spec                    the family's row, to override a choice or to describe a new family
        assistant               for Gemma 4, whose heads are checkpoints of their own: a folder, a repository or a loaded one
        proposer                drafts instead of the head
        num_speculative_tokens  K, or a schedule; "auto" measures which K pays. None: "auto", and for sampled text with a seed,
                                which is to be the same tomorrow, the K that suits the head
        draft_sampling          when sampling: "sample" draws drafts from the head's law, "greedy" takes its likeliest token
        acceptance              "standard", "block", "coupled", or an Acceptance
        cache                   RaggedCache, CropCache, or a factory of one's own
        draft_vocabulary        the only ids that a head drafts: a `DraftVocabulary`, a list, or how many from the first on
        lookup                  where the text repeats itself this drafts instead of the head: NGramProposer(4, min_ngram=3)
        compiled                rounds as compiled graphs: see `warmup`, which makes them ahead
        packed                  on a CPU: a second copy of the weights, laid out for its products; none: as `compiled` says

        Raises UnsupportedModelError, CheckpointError, HeadWeightsError, GenerationError.
        """
        decoder_of(target)
        check_own_code(target)
        if assistant is not None:
            _check_alone(head=head, spec=spec, proposer=proposer)
            proposer = AssistantProposer(assistant_for(target, assistant))
        if proposer is not None and (draft_vocabulary is not None or lookup is not None):
            raise GenerationError("draft_vocabulary= and lookup= go with a head; with proposer= or assistant= there is none.")
        if proposer is None:
            chosen = _restricted(head_for(target, head, spec), draft_vocabulary)
            proposer = MTPProposer(chosen) if lookup is None else MixedProposer(chosen, lookup)
        suits = _suits(proposer)
        if num_speculative_tokens is None:
            options = Options(schedule_for("auto", suits), draft_sampling, acceptance, steady=schedule_for(suits))
        else:
            options = Options(schedule_for(num_speculative_tokens, suits), draft_sampling, acceptance)
        decoder = cls(target, proposer, options.replaced({}), cache)
        if compiled:
            decoder.step = CompiledRound()
        if compiled if packed is None else packed:
            decoder.packing = Packing(decoder.parts())
        return decoder

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike[str], **kwargs: Any) -> MTPDecoder:
        """Target and head from one checkpoint. Takes what `from_model` takes; the rest goes to transformers' from_pretrained."""
        settings = {name: kwargs.pop(name) for name in HOW_TO_BUILD if name in kwargs}
        target = load_target(path_or_repo, **kwargs)
        if not {"proposer", "assistant"} & settings.keys():
            settings.setdefault("head", os.fspath(path_or_repo))
        return cls.from_model(target, **settings)

    def parts(self) -> list[nn.Module]:
        """What tokens go through when they are decoded: the target's decoder and output layer, and what drafts."""
        drafting = self.head.drafting if self.head else [self.assistant] if self.assistant else []
        return [decoder_of(self.target), lm_head_of(self.target), *drafting]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write target and head as one checkpoint, which `from_pretrained` reads back."""
        if self.head is None:
            raise GenerationError("save_pretrained() writes target and head; this decoder has no head. Save the target itself.")
        save_together(self.target, self.head, folder)

    def warmup(
        self,
        batch_sizes: Sequence[int] = (1,),
        num_tokens: int | Sequence[int] = 64,
        num_rounds: int = 4,
        progress: bool = True,
        **options: Any,
    ) -> None:
        """Measure ahead what rounds cost, for every K that the schedule may choose, every batch size and every length of text.

        num_tokens  length of the made-up prompts, or several lengths        num_rounds  rounds of each K that count
        options     as for `generate`: greedy without; another way of sampling has other compiled rounds

        Each batch size and length is one call, whose K changes from round to round. Nothing is learned about acceptance, and
        verifier, cache and metrics stay those of the last call.
        """
        lengths = [num_tokens] if isinstance(num_tokens, int) else num_tokens
        trials = [(Trial(self.options.schedule.choices, num_rounds), *each) for each in product(batch_sizes, lengths)]
        last, spare, self._spare = (self.verifier, self.cache, self.metrics), self._spare, {}
        try:
            with tqdm(total=sum(len(trial.lengths) for trial, *_ in trials), desc="warm-up", disable=not progress) as bar:
                for each in trials:
                    self._try_out(*each, options, bar.update)
        finally:
            (self.verifier, self.cache, self.metrics), self._spare = last, spare

    def _try_out(self, trial: Trial, num_rows: int, num_tokens: int, options: dict[str, Any], tick: Callable[[], Any]) -> None:
        """All rounds of one trial."""
        size, config = int(text_config(self.target).vocab_size), self.target.generation_config
        middle, many = (size // 4, size // 2), torch.Generator().manual_seed(0)  # no special tokens; work for many experts
        inputs = torch.randint(*middle, (num_rows, num_tokens), generator=many).to(self.target.device)
        settings = {"do_sample": False, **options, "num_speculative_tokens": trial}
        settings["max_new_tokens"] = sum(trial.lengths) + len(trial.lengths)
        if config is not None and config.eos_token_id is not None:  # as many as usual, but none that is ever written
            settings["eos_token_id"] = torch.full_like(torch.tensor(config.eos_token_id), size).tolist()
        rounds = self.stream(inputs, attention_mask=torch.ones_like(inputs), **settings)
        for _ in zip(trial.lengths, rounds, strict=False):
            tick()
        for k, seconds in trial.seconds.items():
            for each in seconds:
                self.options.schedule.time(k, num_rows, num_tokens, each)

    def explain(self) -> None:
        """Print what "auto" expects of every K, and what it has measured: tokens and milliseconds a round, tokens a second.

        A table for each batch size and length of text (up to a power of two) that calls had, or `warmup` tried out.
        """
        schedule = self.options.schedule
        if isinstance(schedule, ExpectedSpeedup):
            print(schedule)
        else:
            print(f"K is always {', '.join(map(str, schedule.choices))}: num_speculative_tokens='auto' would measure and choose.")

    def release(self) -> None:
        """Let go of the caches that the last call left behind. Streams that are not over keep theirs."""
        self._spare.clear()
        self.verifier, self.cache = None, None

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Tensor | MTPOutput:
        """What `model.generate` returns for the same arguments, several tokens per forward pass.

        inputs or input_ids (B, P) int64, attention_mask (B, P), or inputs_embeds (B, P, D). Besides what `model.generate` takes:
        num_speculative_tokens, draft_sampling, acceptance (see `from_model`), and seed: an int, or one int per row.

        Every row is decoded as if it were alone: processors see its own tokens without padding. -> (B, P + n) int64, or an
        `MTPOutput` with return_dict_in_generate=True. Raises GenerationError for wrong input and options that are not ours.
        """
        request, options = self._prepare(inputs, kwargs)
        return self._collect(request, options)

    def stream(self, inputs: Tensor | None = None, **kwargs: Any) -> Iterator[Chunk]:
        """Like `generate`, but yields the new tokens of every round as they come."""
        request, options = self._prepare(inputs, kwargs)
        return (Chunk(round.tokens) for round in self._rounds(request, options))

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        seed: int | Sequence[int] | None = None,
        num_speculative_tokens: int | Literal["auto"] | DraftSchedule | None = None,
        draft_sampling: DraftSampling | None = None,
        acceptance: str | Acceptance | None = None,
        **model_kwargs: Any,
    ) -> Tensor | MTPOutput:
        """The seam of transformers: `model.generate(..., custom_generate=decoder)` calls this with everything prepared."""
        if model is not self.target:
            raise GenerationError("custom_generate=decoder was given to another model than the decoder's own target.")
        said = dict(zip(OURS, (seed, num_speculative_tokens, draft_sampling, acceptance), strict=True))
        options = self.options.replaced(said)
        check_inputs(model, {"input_ids": input_ids, **model_kwargs})
        request = self._request(
            input_ids, logits_processor, stopping_criteria, generation_config, streamer, options, model_kwargs
        )
        return self._collect(request, options)

    def _prepare(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> tuple[Request, Options]:
        """Let transformers prepare configuration, processors and criteria as it would for its own loop."""
        if inputs is not None:
            if kwargs.get("input_ids") is not None:
                raise GenerationError(
                    "generate() was given a prompt twice, first by position and then as input_ids=. Pass one of them."
                )
            kwargs["input_ids"] = inputs
        kwargs = without_text_types(kwargs)
        check_keywords(self.target, kwargs)
        check_inputs(self.target, kwargs)
        options = self.options.replaced({name: kwargs.pop(name) for name in OURS if name in kwargs})
        streamer = kwargs.pop("streamer", None)
        self._take_stop_strings(kwargs)
        given = left_padded(kwargs)
        given.pop("custom_generate", None)  # None, or check_keywords would have spoken

        def prepared(
            model: PreTrainedModel,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: GenerationConfig,
            **model_kwargs: Any,
        ) -> Request:
            return self._request(
                input_ids, logits_processor, stopping_criteria, generation_config, streamer, options, model_kwargs
            )

        plain: Any = type(self.target)  # not the model's own attribute, which may be us: model.generate = decoder.generate
        request: Request = plain.generate(self.target, **given, custom_generate=prepared)
        return request.as_given(kwargs), options

    def _take_stop_strings(self, kwargs: dict[str, Any]) -> None:
        """transformers forgets the tokenizer on its way to a custom_generate, so the criterion is made here."""
        configs = (kwargs.get("generation_config"), self.target.generation_config)
        said = [kwargs.get("stop_strings"), *(config.stop_strings for config in configs if config is not None)]
        strings, tokenizer = next((each for each in said if each is not None), None), kwargs.pop("tokenizer", None)
        if strings is None:
            return
        if tokenizer is None:
            raise GenerationError(f"stop_strings={strings!r} was asked for without a tokenizer. Pass tokenizer=tokenizer too.")
        criterion = StopStringCriteria(tokenizer, strings)
        kwargs["stop_strings"] = None  # as a keyword it takes precedence over both configurations
        kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), criterion])

    def _request(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: BaseStreamer | None,
        options: Options,
        model_kwargs: dict[str, Any],
    ) -> Request:
        check_prepared(config, self.target.generation_config)
        check_seam(self.target, model_kwargs)
        widest = max(options.schedule.choices) + 1
        return request_from(self.target, input_ids, model_kwargs, processors, criteria, config, streamer, overhang=2 * widest)

    def _collect(self, request: Request, options: Options) -> Tensor | MTPOutput:
        rows: list[list[int]] = [[] for _ in range(request.input_ids.shape[0])]
        streamer = request.streamer
        if streamer is not None:
            _check_streamer(rows)
            streamer.put(request.input_ids.cpu())
        for round in self._rounds(request, options, at_once=None if streamer is None else 1):
            for row, tokens in zip(rows, round.tokens, strict=True):
                row += tokens
            if streamer is not None:
                for token in round.tokens[0]:
                    streamer.put(torch.tensor([token]))
        if streamer is not None:
            streamer.end()
        sequences = request.sequences(rows)
        if not request.config.return_dict_in_generate:
            return sequences
        return MTPOutput(sequences=sequences, metrics=self.metrics)  # type: ignore[arg-type]  # any int64 tensor is meant

    def _rounds(self, request: Request, options: Options, at_once: int | None = 1) -> Iterator[Round]:
        """at_once: how many rounds to make while nobody looks, None: all; to stand aside and to be back takes time in each."""
        options = options.settled(bool(request.config.do_sample))
        roles, noise = self._roles(request, options), Noise(seeds_for(options.seed, request.prompt.lengths))
        self.verifier, self.cache, self.metrics = roles.verifier, roles.verifier.cache, Metrics(request.prompt.lengths.shape[0])
        chunk_size = request.config.prefill_chunk_size or PREFILL_CHUNK
        width = self.head.width if self.head else text_config(self.target).hidden_size
        rounds = decode(request.prompt, request.text, roles, noise, self.metrics, chunk_size, width, self.step)
        self.packing.renew()
        training = training_modules(self.target, *(part for part in (self.head, self.assistant) if part))
        try:
            while True:
                with torch.no_grad(), evaluating(training), folding(), self.packing.used(), roles.listening():
                    made = with_room(list, islice(rounds, at_once))
                if not made:
                    return
                yield from made
        finally:  # all tokens are there, or nobody asks for more
            self._spare |= enumerate(roles.caches)

    def _roles(self, request: Request, options: Options) -> Roles:
        """Everything that lives as long as one call."""
        sampler = Sampler(request.processors, bool(request.config.do_sample), request.padding, request.prompt.lengths.device)
        layout = self._layout(prompt_lengths=request.prompt.lengths.clone())  # a tensor of its own, for compiled rounds
        caches = [self._cache_for(0, request, layout, text_config(self.target).num_hidden_layers)]
        deepest = max(options.schedule.choices)
        proposer = self.proposer if deepest else NoDraft()
        if isinstance(proposer, (MTPProposer, AssistantProposer)):
            proposer = copy(proposer)  # a stream of an earlier call may still be running on its own
        if isinstance(proposer, MTPProposer):
            caches.append(self._cache_for(1, request, self._layout(proposer.head), proposer.head.num_cached(deepest)))
        purpose = Purpose.TARGET if options.rule is None else Purpose.DRAFT  # coupled drafts share the target's numbers
        call = Call(request.prompt, sampler, deepest, options.draft_sampling, purpose, caches[0])
        proposer.begin(call, caches[1] if len(caches) > 1 else None)
        hidden = self.head.spec.hidden if self.head else "post_norm"
        verifier = Verifier(self.target, caches[0], sampler, hidden, request.prompt)
        rule, stopping, schedule = options.rule, request.stopping, options.schedule
        late = int(request.prompt.lengths.is_cuda)
        return Roles(proposer, verifier, sampler, rule, stopping, schedule, tuple(caches), deepest + 1, late)

    def _layout(self, head: MTPHead | None = None, prompt_lengths: Tensor | None = None) -> CacheLayout:
        """What a cache of the target, or of the head, must know: each call anew, for set_attn_implementation may come between."""
        config = head.config if head else text_config(self.target)
        name = "The MTP head" if head else type(self.target).__name__
        blocks = head.blocks if head else decoder_of(self.target).layers
        plans = layer_plans(config, blocks, name)
        windows, attention = layer_windows(config, name), check_attention(config, name)
        return CacheLayout(windows, attention, self.target.dtype, plans, prompt_lengths)

    def _cache_for(self, place: int, request: Request, layout: CacheLayout, num_layers: int) -> KVCacheManager:
        """That of an earlier call which is over, if it does, else a new one."""
        lengths, spare = request.prompt.lengths, self._spare.pop(place, None)
        asked = (layout, num_layers, lengths.shape[0], lengths.device)
        return spare if spare is not None and spare.cleared(*asked) else self._cache_factory(*asked)


def _check_alone(**others: object) -> None:
    """Raise GenerationError where an assistant was given and something else besides that says what drafts."""
    given = [f"{name}=" for name, value in others.items() if value is not None]
    if given:
        raise GenerationError(
            f"assistant= was given, and {' and '.join(given)} besides; one of them drafts. Pass assistant= alone."
        )


def _suits(proposer: Proposer) -> int:
    """The K that suits what drafts."""
    if isinstance(proposer, AssistantProposer):
        return proposer.assistant.num_speculative_tokens
    return proposer.head.num_speculative_tokens if isinstance(proposer, MTPProposer) else 3


def _restricted(head: MTPHead, asked: DraftVocabulary | Tensor | Sequence[int] | int | None) -> MTPHead:
    return head if asked is None else head.restricted(draft_ids(asked, int(head.config.vocab_size)))


def _check_streamer(rows: list[list[int]]) -> None:
    if len(rows) > 1:
        raise GenerationError(
            f"streamer= was given for {len(rows)} rows; they advance by different numbers of tokens, which streamers cannot say. "
            "Use decoder.stream(...), which yields every row's new tokens."
        )


_HEADS: WeakKeyDictionary[PreTrainedModel, MTPHead] = WeakKeyDictionary()
"""The heads that `generate` has read, so that a second call reads nothing; they go when their models go."""
_ASSISTANTS: WeakKeyDictionary[PreTrainedModel, dict[Any, Assistant]] = WeakKeyDictionary()
"""The same for assistants, by what was given as `assistant=`."""


def generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    *,
    assistant: Assistant | PreTrainedModel | str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> Tensor | MTPOutput:
    """One line in a notebook: `MTPDecoder.from_model(model).generate(...)`; the head is read at a model's first call only.

    assistant  for Gemma 4: see `MTPDecoder.from_model`
    """
    if assistant is not None:
        known = _ASSISTANTS.setdefault(model, {})
        if assistant not in known:
            known[assistant] = assistant_for(model, assistant)
        return MTPDecoder.from_model(model, assistant=known[assistant]).generate(inputs, **kwargs)
    if model not in _HEADS:
        _HEADS[model] = head_for(model, None, None)
    return MTPDecoder.from_model(model, head=_HEADS[model]).generate(inputs, **kwargs)

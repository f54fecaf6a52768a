"""What flash8 does with a family of transformers' models, found out by running a tiny one."""

import inspect

import torch

from flash8.integrations import transformers as flash8_transformers
from transformers_zoo import VOCABULARY, NotBuiltError, count_calls, new_model, set_implementation

NAME = flash8_transformers.ATTENTION_NAME
SEQLEN = 19
DOCUMENTS = (7, 3, 9)  # longer than the windows and chunks of the zoo, which are 5
TOLERANCE = 2e-4  # of logits of order one; what leaks or looks ahead moves them by 1e-2 and more

#: What became of the attention of a family.
SERVED = "served"
OWN = "no attention that transformers dispatches, and the same results"
REFUSED_LOADING = "refused when loaded"
REFUSED_CALLED = "refused when called"
NOT_BUILT = "no tiny model"
#: What became of packed sequences.
APART = "each as alone"
#: transformers' own rule: position_ids count where no attention_mask is given. Other families hand
#: position_ids to each layer, where they count in any case.
APART_BY_MASK = "each as alone, if attention_mask is None"
#: Neither the mask nor a layer is told position_ids; sequences mix with every implementation.
UNSEEN = "position_ids reach no attention"
#: Models of three coordinates per token take a fourth row, of the positions in the text.
APART_IN_ROWS = "each as alone, as four rows of which the first counts"
REFUSED = "refused"
MIXED_ELSEWHERE = "mixed outside attention"
NO_POSITIONS = "takes no position_ids"


class WrongError(AssertionError):
    """A result that differs in silence."""


class Subject:
    """A model of one family and the ways to call it."""

    def __init__(self, kind, family, implementation):
        self.model = new_model(kind, family, implementation)
        self.is_seq2seq = kind == "seq2seq"
        generator = torch.Generator().manual_seed(2)
        self.tokens = torch.randint(3, VOCABULARY, (2, SEQLEN), generator=generator)
        self.source = torch.randint(3, VOCABULARY, (2, 9), generator=generator)
        self.parameters = inspect.signature(self.model.forward).parameters

    def logits(self, tokens, **inputs):
        if self.is_seq2seq and "decoder_input_ids" in self.parameters:
            for name in ("attention_mask", "position_ids"):
                if name in inputs:
                    inputs[f"decoder_{name}"] = inputs.pop(name)
            inputs |= dict(input_ids=self.source[: len(tokens)], decoder_input_ids=tokens)
        else:
            inputs["input_ids"] = tokens
        if "use_cache" in self.parameters:
            inputs["use_cache"] = False
        with torch.no_grad():
            output = self.model(**inputs)
        logits = getattr(output, "logits", None)
        return output[0] if logits is None else logits

    def generate(self, cache):
        """The logits of generated tokens (tokens, batch, vocabulary)."""
        mask = _padding("left") if not self.is_seq2seq else None
        prompt = self.source if self.is_seq2seq else self.tokens
        output = self.model.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=4,
            do_sample=False,
            cache_implementation=cache,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
            eos_token_id=None,
            disable_compile=True,
        )
        return torch.stack(output.logits)

    @property
    def takes_positions(self):
        return "position_ids" in self.parameters and not self.is_seq2seq


def examine(kind, family):
    """(what became of attention, of sequences packed by position_ids, by boundaries).

    Raises:
        WrongError: flash8 gives another result than eager attention, lets a later token move an
            earlier logit, or lets packed sequences see each other.
    """
    try:
        eager = Subject(kind, family, "eager")
        expected = eager.logits(eager.tokens)
    except NotBuiltError:
        return NOT_BUILT, None, None
    except Exception as error:  # wants images or sounds, or sizes of its own
        return f"{NOT_BUILT}: {error}", None, None
    try:
        ours = Subject(kind, family, NAME)
    except ValueError as error:
        _check_refusal(error)
        _check_forced(eager, expected)
        return REFUSED_LOADING, None, None
    with count_calls(NAME) as calls:
        refused = _compare(ours, eager.tokens, expected, "without a mask")
    if refused:
        return REFUSED_CALLED, None, None
    _check_causality(ours, eager, expected)
    for side in ("left", "right"):
        mask = _padding(side)
        try:
            padded = eager.logits(eager.tokens, attention_mask=mask)
        except Exception:
            continue  # no such input
        if padded.shape == expected.shape:
            _compare(ours, eager.tokens, padded, f"padding on the {side}", mask)
    packed = _packing(ours, eager) if ours.takes_positions else (NO_POSITIONS, NO_POSITIONS)
    return SERVED if calls["all"] else OWN, *packed


def _padding(side):
    mask = torch.ones(2, SEQLEN, dtype=torch.long)
    mask[0, slice(8) if side == "left" else slice(-8, None)] = 0
    return mask


def _same(result, expected):
    error = (result - expected).abs() / (1 + expected.abs())
    return bool(torch.isfinite(result).all()) and error.max().item() < TOLERANCE


def _compare(subject, tokens, expected, what, mask=None, **inputs):
    """Whether the call is refused; a result must be the expected one."""
    try:
        given = inputs if mask is None else inputs | dict(attention_mask=mask)
        result = subject.logits(tokens, **given)
    except ValueError as error:
        _check_refusal(error)
        return True
    valid = slice(None) if mask is None else mask.bool()
    if not _same(result[valid], expected[valid]):
        raise WrongError(f"{what}: not what eager attention gives")
    return False


def _check_refusal(error):
    if "use attn_implementation=" not in str(error):
        raise WrongError(f"refused without saying what to do: {error}") from error


def _check_forced(eager, expected):
    """The implementation set in the configuration, past the refusal when loading."""
    set_implementation(eager.model, NAME)
    try:
        _compare(eager, eager.tokens, expected, "set in the configuration")
    except KeyError as error:  # a table of classes, looked up in the call
        if NAME not in str(error):
            raise


def _check_causality(ours, eager, expected):
    changed = eager.tokens.clone()
    changed[:, -1] = (changed[:, -1] - 3 + 7) % (VOCABULARY - 3) + 3
    if _same(eager.logits(changed)[:, :-1], expected[:, :-1]):
        before, after = (ours.logits(tokens)[:, :-1] for tokens in (ours.tokens, changed))
        if not _same(after, before):
            raise WrongError("the last token moves earlier logits")


def _packing(ours, eager):
    """Each packed sequence against the same model run on it alone."""
    tokens = eager.tokens[:1]
    pieces = [torch.arange(length)[None] for length in DOCUMENTS]
    position_ids = torch.cat(pieces, dim=1)
    try:
        alone = torch.cat(
            [
                eager.logits(document, position_ids=piece)
                for document, piece in zip(tokens.split(DOCUMENTS, dim=1), pieces, strict=True)
            ],
            dim=1,
        )
    except Exception:  # positions of another form
        return NO_POSITIONS, NO_POSITIONS
    ends = torch.tensor(DOCUMENTS).cumsum(0)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), ends]).to(torch.int32)
    longest = max(DOCUMENTS)
    boundaries = dict(
        cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens,
        max_length_q=longest,
        max_length_k=longest,
    )
    positions = dict(position_ids=position_ids)
    by_boundaries = _packed(ours, eager, tokens, alone, positions | boundaries)
    with count_calls(NAME) as calls:
        ours.logits(tokens, **positions)
    if calls["position_ids"] == 0 and by_boundaries == APART:
        packed = eager.logits(tokens, **positions)
        if not _same(packed, alone):  # transformers does not keep them apart either
            return _in_rows(ours, tokens, alone, position_ids), by_boundaries
    by_positions = _packed(ours, eager, tokens, alone, positions)
    if by_positions == APART and calls["position_ids"] == 0:
        by_positions = APART_BY_MASK
    else:
        ones = dict(attention_mask=torch.ones_like(tokens))
        beside_ones = _packed(ours, eager, tokens, alone, positions | ones)
        if beside_ones != by_positions:
            raise WrongError(f"packed: {by_positions}; beside a mask of ones: {beside_ones}")
    return by_positions, by_boundaries


def _in_rows(ours, tokens, alone, position_ids):
    try:
        logits = ours.logits(tokens, position_ids=position_ids.expand(4, 1, -1))
    except Exception:
        return UNSEEN
    return APART_IN_ROWS if logits.shape == alone.shape and _same(logits, alone) else UNSEEN


def _packed(ours, eager, tokens, alone, inputs):
    try:
        if _compare(ours, tokens, alone, "packed", **inputs):
            return REFUSED
    except WrongError:
        if not _mixes_elsewhere(eager, tokens, inputs["position_ids"]):
            raise
        return MIXED_ELSEWHERE
    return APART


def _mixes_elsewhere(eager, tokens, position_ids):
    """Whether the first document moves the logits of the second though eager attention is given a
    mask that keeps them apart: convolutions and recurrences, which no attention function sees."""
    document = (position_ids[0] == 0).cumsum(0)
    visible = (document[:, None] == document).tril()
    bias = torch.zeros(1, 1, SEQLEN, SEQLEN).masked_fill(~visible, torch.finfo().min)
    first, second = slice(DOCUMENTS[0]), slice(DOCUMENTS[0], DOCUMENTS[0] + DOCUMENTS[1])
    changed = tokens.clone()
    changed[:, first] = VOCABULARY + 2 - changed[:, first]
    try:
        before, after = (
            eager.logits(x, position_ids=position_ids, attention_mask=bias)[:, second]
            for x in (tokens, changed)
        )
    except Exception:  # takes no mask of four dimensions
        return False
    return not _same(after, before)


def examine_generation(kind, family, cache):
    """What became of generate() with left padding, or None where eager attention cannot either.

    Raises:
        WrongError: other tokens or logits than those of eager attention.
    """
    try:
        eager = Subject(kind, family, "eager")
        expected = eager.generate(cache)
    except Exception:
        return None
    try:
        ours = Subject(kind, family, NAME)
        logits = ours.generate(cache)
    except ValueError as error:
        _check_refusal(error)
        return REFUSED
    if not _same(logits, expected):
        raise WrongError(f"generate with a {cache} cache: not what eager attention gives")
    return SERVED

"""Emphasis by the rules of A1111: how a prompt is parsed, and that the image is that of embeddings
weighted by hand.
"""

import pytest
import torch

from backends.errors import RequestError, UnsupportedError
from backends.generation.batching import batch_key
from backends.generation.text.emphasis import Part, has_emphasis, parse_emphasis
from backends.generation.text.prompts import a1111_prompts
from backends.request import GenerateRequest
from tests.backends.features import TABLE, loaded
from tests.backends.loading.test_adapters import difference, draw

WEIGHED = {"prompt_syntax": "a1111"}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("\\(literal\\]", [("(literal]", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("(word:1.3)", [("word", 1.3)]),
        ("(word: -.5 )", [("word", -0.5)]),
        ("((a)b:2)", [("a", 2.2), ("b", 2)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("[(a:1.1)]", [("a", 1)]),
        ("a) ] b:1.2)", [("a) ] b:1.2)", 1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.1 / 1.1), (" c", 1 / 1.1)]),
        ("back\\slash \\\\", [("backslash \\", 1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:b:1.5)", [("a:b", 1.5)]),
        ("", [("", 1)]),
        ("a BREAK b", [("a", 1), None, ("b", 1)]),
        ("(a BREAK b:2)", [("a", 2), None, ("b", 2)]),
        ("aBREAK BREAKb", [("aBREAK BREAKb", 1)]),
        ("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
         [("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55),
          (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)]),
    ],
)  # fmt: skip
def test_prompts_are_parsed_as_by_a1111(text, parts):
    found = parse_emphasis(text, field="prompt")
    assert [None if part.is_break else part.text for part in found] == [
        None if part is None else part[0] for part in parts
    ]
    weights = [part.weight for part in found if not part.is_break]
    assert weights == pytest.approx([part[1] for part in parts if part is not None])
    assert has_emphasis(text) or found == [Part(text)]


@pytest.mark.parametrize("text", ["a AND b", "[a:b:0.5]", "[a|b]", "[a:5]", "a [b::3] c"])
def test_prompts_that_change_between_steps_are_refused(text):
    with pytest.raises(UnsupportedError, match=r"prompt has .* not available"):
        parse_emphasis(text, field="prompt")


@pytest.mark.parametrize("text", ["band AND_ and", "\\[a|b\\]", "a|b", "[a: b]", "[at 3: c]"])
def test_text_that_only_resembles_them_is_not(text):
    parse_emphasis(text, field="prompt")


def test_weights_beyond_reason_are_refused():
    with pytest.raises(RequestError, match="negative_prompt has the weight 1e"):
        parse_emphasis("(a:99999999999)", field="negative_prompt")
    with pytest.raises(RequestError, match="has the weight"):
        parse_emphasis("(" * 200 + "a", field="prompt")


def by_hand(pipe, text, weights, *, skip=0):
    """Embeddings of one chunk: encoder's states times a weight for each word, with the old mean.

    weights: word -> weight. The words are whole tokens of the test's vocabulary.
    """
    found, pooled = [], None
    for name in pipe.spec.compel:
        encoder = getattr(pipe.pipe, name)
        tokenizer = getattr(pipe.pipe, name.replace("text_encoder", "tokenizer"))
        ids = tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        factors = torch.ones(77)
        for word, weight in weights.items():
            (token,) = tokenizer(word, add_special_tokens=False).input_ids
            factors[ids[0] == token] = weight
        with torch.no_grad():
            output = encoder(ids, output_hidden_states=True)
        if len(pipe.spec.compel) > 1:
            states, pooled = output.hidden_states[-(skip + 2)], output[0]
        elif skip:
            inner = getattr(encoder, "text_model", encoder)
            with torch.no_grad():
                states = inner.final_layer_norm(output.hidden_states[-(skip + 1)])
        else:
            states = output[0]
        weighed = states * factors[None, :, None]
        found.append(weighed * (states.mean() / weighed.mean()))
    return torch.cat(found, dim=-1), pooled


@pytest.fixture(scope="module", params=["sd1", "sdxl", pytest.param("sd2", marks=pytest.mark.slow)])
def pipe(request):
    """The layer norms of a new encoder leave a mean of 0, or of rounding errors. Published ones
    have learnt another.
    """
    made = loaded(TABLE[request.param])
    for name in made.spec.compel:
        encoder = getattr(made.pipe, name)
        inner = getattr(encoder, "text_model", encoder)
        with torch.no_grad():
            inner.final_layer_norm.bias.add_(0.1)
            for layer in inner.encoder.layers:
                layer.mlp.fc2.bias.add_(0.1)
    return made


def fields(pipe, positive, negative):
    """Request fields of embeddings by hand."""
    made = {"prompt_embeds": positive[0].numpy(), "negative_prompt_embeds": negative[0].numpy()}
    if positive[1] is not None:
        made |= {
            "pooled_prompt_embeds": positive[1].numpy(),
            "negative_pooled_prompt_embeds": negative[1].numpy(),
        }
    return {"prompt": None, "negative_prompt": None, **made}


def test_image_is_that_of_embeddings_weighted_by_hand(pipe):
    asked = {"prompt": "a (red:1.6) cat, [[river]]", "negative_prompt": "((blurry)) dog"}
    positive = by_hand(pipe, "a red cat, river", {"red": 1.6, "river": 1.1**-2})
    negative = by_hand(pipe, "blurry dog", {"blurry": 1.21})
    weighed = draw(pipe, **asked, **WEIGHED)
    assert difference(weighed, draw(pipe, **fields(pipe, positive, negative))) <= 1
    plain = {"prompt": "a red cat, river", "negative_prompt": "blurry dog"}
    assert difference(weighed, draw(pipe, **plain)) > 2


def test_plain_text_is_read_as_the_pipeline_reads_it(pipe):
    for asked in (
        {"prompt": "a red cat", "negative_prompt": "a dog"},
        {"prompt": "a red cat", "negative_prompt": None},
        {"prompt": "a red cat", "negative_prompt": None, "clip_skip": 1},
    ):
        assert difference(draw(pipe, **asked, **WEIGHED), draw(pipe, **asked)) == 0
    escaped = {"prompt": "a \\(red\\) cat", **WEIGHED}
    assert difference(draw(pipe, **escaped), draw(pipe, prompt="a (red) cat")) == 0


def test_skipped_layers_and_weights_go_together(pipe):
    asked = {"prompt": "a (red:1.6) cat", "negative_prompt": "a dog", "clip_skip": 1}
    positive = by_hand(pipe, "a red cat", {"red": 1.6}, skip=1)
    negative = by_hand(pipe, "a dog", {})
    wanted = draw(pipe, **fields(pipe, positive, negative))
    assert difference(draw(pipe, **asked, **WEIGHED), wanted) <= 1


def test_chunks_of_a_long_prompt_are_encoded_one_by_one(pipe):
    """BREAK after a text gives the embeddings of both parts, and a short negative prompt acts as it
    does alone.
    """
    asked = {"prompt": "a red cat BREAK a blue dog", "negative_prompt": "night"}
    first, second = by_hand(pipe, "a red cat", {}), by_hand(pipe, "a blue dog", {})
    negative = by_hand(pipe, "night", {})
    positive = (torch.cat([first[0], second[0]], dim=1), first[1])
    twice = (torch.cat([negative[0]] * 2, dim=1), negative[1])
    wanted = draw(pipe, **fields(pipe, positive, twice))
    assert difference(draw(pipe, **asked, **WEIGHED), wanted) == 0


def chunks(pipe, text):
    """The texts of the chunks, as the first tokenizer writes them."""
    _, readers, _ = a1111_prompts(pipe.pipe, pipe.spec, clip_skip=None)._readers[0]
    found = readers["prompt"]._chunks(parse_emphasis(text, field="prompt"))
    assert all(len(chunk) <= 75 for chunk in found)
    return [pipe.pipe.tokenizer.decode([token for token, _ in chunk]) for chunk in found]


def test_long_prompts_are_cut_at_75_tokens_or_at_a_near_comma(pipe):
    assert [len(text.split()) for text in chunks(pipe, "car " * 160)] == [75, 75, 10]
    near = chunks(pipe, "car " * 60 + ", " + "dog " * 30)
    assert near[0].endswith(",") and near[1].split() == ["dog"] * 30
    far = chunks(pipe, "car " * 50 + ", " + "dog " * 30)
    assert far[1].split() == ["dog"] * 6
    assert len(chunks(pipe, "car BREAK")) == 1 and len(chunks(pipe, "")) == 1
    assert chunks(pipe, "BREAK car") == ["", "car"]
    long = {"prompt": "car, " * 60 + "red", **WEIGHED}
    other = {"prompt": "car, " * 60 + "blue", **WEIGHED}
    assert difference(draw(pipe, **long), draw(pipe, **other)) > 0


def test_weighted_prompts_are_no_rows_of_a_batch(pipe):
    request = GenerateRequest(prompt="(a)", **WEIGHED)
    assert batch_key(request, pipe.load) is None
    assert batch_key(GenerateRequest(prompt="a"), pipe.load) is not None


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("flux", {"prompt": "(a)"}, "FLUX.1 has no weights of words"),
        ("sd1", {"prompt": "a AND b"}, "prompt has 'AND'"),
        ("sd1", {"prompt": "a", "negative_prompt": "(a:999)"}, "has the weight 999"),
        ("sd1", {"prompt": "cat " * 76 * 9, "negative_prompt": "cat " * 76 * 13}, "too long"),
    ],
)
def test_what_cannot_be_read_is_refused(name, asked, said):
    with pytest.raises((UnsupportedError, RequestError), match=said):
        draw(loaded(TABLE[name]), **asked, **WEIGHED)

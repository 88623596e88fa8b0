"""A stock backbone with a mask adapter: tokens and log-probabilities of stock vLLM without us."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from device import DEVICE
from mask_adapters import write_adapter
from near_ties import assert_near_stock, bfloat16_error
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from vllm import SamplingParams, TokensPrompt
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

from conformance import build_model, write_tokenizer
from engine import STOCK_GRAPHS, assert_idle, engine, free_pages, model_runner_of, model_state_of
from vllm_refusion.adapters import CONFIG, TENSORS, adapter_tensors, read_adapter
from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.reference import decode
from vllm_refusion.decoding.state import Counter, Field
from vllm_refusion.engine import mask_adapter
from vllm_refusion.engine.pass_cost import measure_passes
from vllm_refusion.triton_kernels.mask_lora_twin import (
    allocate_parts,
    expand_masks_twin,
    shrink_masks_twin,
)

BASES = ("qwen3-gqa2", "llama-gqa4", "qwen2")
TOKENS = 40


def build_base(name: str, folder: Path) -> Path:
    """A stock checkpoint: without a mask token."""
    if name == "qwen2":
        torch.manual_seed(3)
        config = Qwen2Config(
            vocab_size=125,
            hidden_size=96,
            intermediate_size=72,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=1,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=11,
        )
        Qwen2ForCausalLM(config).save_pretrained(folder)
        write_tokenizer(folder, config.vocab_size, config.eos_token_id)
        return folder
    build_model(name, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["mask_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def without_effect(adapter: Path) -> Path:
    """As an adapter begins its training: every B is zero."""
    tensors = load_file(adapter / TENSORS)
    zeros = {key: tensor * ("lora_B" not in key) for key, tensor in tensors.items()}
    save_file(zeros, adapter / TENSORS)
    return adapter


class Base:
    """A base, adapters of it, and what stock vLLM answers."""

    def __init__(self, name: str, folder: Path) -> None:
        self.path = build_base(name, folder / "base")
        self.config = json.loads((self.path / "config.json").read_text())
        self.vocab = self.config["vocab_size"]
        self.adapter = write_adapter(folder / "adapter", self.path)
        self.zeros = without_effect(write_adapter(folder / "zeros", self.path, rank=20))
        some = ("k_proj", "o_proj", "up_proj")
        self.partial = write_adapter(
            folder / "partial", self.path, targets=some, layers=[1], rank=1, size=3.0
        )
        self.answers = cache(self._answers)
        self.model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()

    def prompts(self, count: int) -> list[list[int]]:
        draw = random.Random(count)
        lengths = [draw.choice((1, 5, 30, 90, 200)) for _ in range(count)]
        return [draw.choices(range(self.vocab), k=length) for length in lengths]

    def _answers(self, count: int) -> list:
        with engine(self.path) as llm:
            return ask(llm, self.prompts(count))

    def sample(
        self, prompt: list[int], parameters: SamplingParams, child: int = 0
    ) -> tuple[list[int], list | None]:
        """What the reference draws. Stock vLLM's noise is another; ours depends on seed, position
        and token alone.
        """
        names = ("max_tokens", "temperature", "top_p", "presence_penalty", "logprobs")
        drawn = decode(
            self.model,
            prompt,
            DecodingParams(mode="serial", slot_start="next"),
            mask_token_id=self.vocab,
            eos_token_id=None if parameters.ignore_eos else self.config["eos_token_id"],
            seed=parameters.seed + child,
            **{name: getattr(parameters, name) for name in names},
        )
        return list(drawn.tokens), drawn.logprobs


def parameters(index: int, **options) -> SamplingParams:
    asked = {
        "temperature": 0,
        "max_tokens": 1 + index * 7 % TOKENS,
        "ignore_eos": index % 3 == 0,
        "logprobs": 2 if index % 2 else None,
        "detokenize": False,
    }
    return SamplingParams(**asked | options)


WORDS = {"regex": "(t[2-8]){3,20}"}  # no token is the beginning of another that it allows
KINDS: list[dict] = [
    {},
    {"repetition_penalty": 1.3},
    {"temperature": 0.8, "top_p": 0.9},
    {"frequency_penalty": 0.8, "presence_penalty": -0.5, "min_tokens": 1},
    {"structured_outputs": WORDS},
    {"presence_penalty": 0.7},
    {"temperature": 1.2, "presence_penalty": 1.5, "n": 2},
    {"structured_outputs": WORDS, "repetition_penalty": 1.5, "frequency_penalty": 0.3},
    {"logit_bias": {5: 2.0}, "stop_token_ids": [9, 40], "frequency_penalty": -0.2},
]


def mixed(index: int) -> SamplingParams:
    """As ``parameters``, in turn with each of ``KINDS``."""
    kind = dict(KINDS[index % len(KINDS)])
    if follows := kind.get("structured_outputs"):
        kind["structured_outputs"] = StructuredOutputsParams(**follows)
    return parameters(index, seed=index, **kind)


def ask(llm, prompts, **options) -> list[tuple[list[int], list | None]]:
    """(tokens, log-probabilities by token) of each."""
    asked = [parameters(index, **options) for index in range(len(prompts))]
    return [answers[0] for answers in ask_all(llm, prompts, asked)]


def ask_all(llm, prompts, asked: list[SamplingParams]) -> list[list[tuple[list[int], list | None]]]:
    """As ``ask``, for parameters of any kind; all answers to each."""
    inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    outputs = llm.generate(inputs, asked, use_tqdm=False)
    return [
        [answer_of(choice) for choice in sorted(output.outputs, key=lambda o: o.index)]
        for output in outputs
    ]


def answer_of(output) -> tuple[list[int], list | None]:
    """Without what a grammar forbids, whose log-probability is none."""
    entries = output.logprobs and [
        {token: entry.logprob for token, entry in entry.items() if entry.logprob > -1e30}
        for entry in output.logprobs
    ]
    return list(output.token_ids), entries


def assert_same(answers, expected, what: str = "request") -> None:
    for i, ((tokens, logprobs), (stock_tokens, stock_logprobs)) in enumerate(
        zip(answers, expected, strict=True)
    ):
        assert tokens == stock_tokens, f"{what} {i}"
        assert (logprobs is None) == (stock_logprobs is None)
        for entry, stock in zip(logprobs or (), stock_logprobs or (), strict=True):
            assert entry == pytest.approx(stock, abs=1e-4), f"{what} {i}"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return cache(lambda name: Base(name, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("qwen3-gqa2", "adapter"),
        ("qwen2", "partial"),
        *(pytest.param(name, "adapter", marks=pytest.mark.slow) for name in BASES[1:]),
        pytest.param("llama-gqa4", "zeros", marks=pytest.mark.slow),
    ],
)
def test_answers_of_stock_vllm(bases, name, kind):
    base = bases(name)
    with engine(getattr(base, kind)) as llm:
        pages = free_pages(llm)
        assert_same(ask(llm, base.prompts(16)), base.answers(16))
        counts = model_state_of(llm).decode_state.counters.tolist()
        assert_idle(llm, pages)
    assert counts[Counter.DRAFTS_TESTED]


def test_beam_search_and_penalties_of_stock_vllm(bases):
    """The base's own defaults for requests, penalties among them, and beams over its rows."""
    base = bases("llama-gqa4")
    generation = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "temperature": 0.0}
    options = {"skip_tokenizer_init": False, "override_generation_config": generation}
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in base.prompts(6)]

    def answers(llm):
        params = llm.get_default_sampling_params()
        params.max_tokens = 30
        outputs = llm.generate(prompts, params, use_tqdm=False)
        beams = [
            [(beam.tokens, beam.cum_logprob) for beam in output.sequences]
            for width in (1, 4)
            for output in llm.beam_search(prompts, BeamSearchParams(width, max_tokens=8))
        ]
        return [output.outputs[0].token_ids for output in outputs], beams

    with engine(base.path, **options) as llm:
        expected, beams = answers(llm)
    with engine(base.adapter, **options) as llm:
        tokens, ours = answers(llm)
    assert tokens == expected
    for found, wanted in zip(ours, beams, strict=True):
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted]
        assert [p for _, p in found] == pytest.approx([p for _, p in wanted], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_200_requests(bases, name, async_scheduling):
    """Of all kinds beside each other; those that draw are the reference's, not stock vLLM's."""
    base = bases(name)
    prompts, asked = base.prompts(200), [mixed(index) for index in range(200)]
    options = {"skip_tokenizer_init": False}
    with engine(base.path, **options) as llm:
        expected = ask_all(llm, prompts, asked)
    option = {"refusion_adapter": str(base.adapter)}
    with engine(base.path, additional_config=option, **options) as llm:
        answers = ask_all(llm, prompts, asked)
        counts = model_state_of(llm).decode_state.counters.tolist()
    for i, parameters in enumerate(asked):
        wanted = expected[i]
        if parameters.temperature:
            wanted = [base.sample(prompts[i], parameters, child) for child in range(parameters.n)]
        assert_same(answers[i], wanted, f"request {i}")
    assert counts[Counter.DRAFTS_PASSED] > 50


@pytest.mark.slow
def test_bfloat16_differs_from_stock_by_near_ties_alone(bases, capsys):
    base = bases("qwen3-gqa2")
    prompts = base.prompts(100)
    asked = [parameters(i, max_tokens=40, ignore_eos=True, logprobs=20) for i in range(100)]
    with engine(base.path, dtype="bfloat16", **STOCK_GRAPHS) as llm:
        expected = ask_all(llm, prompts, asked)
    with engine(base.adapter, dtype="bfloat16") as llm:
        answers = ask_all(llm, prompts, asked)
    differing = 0
    for i, ([(tokens, _)], [(stock, logprobs)]) in enumerate(zip(answers, expected, strict=True)):
        if tokens != stock:
            error, _ = bfloat16_error(base.path, prompts[i], stock)
            assert_near_stock(tokens, stock, logprobs, 2 * error, f"request {i}")
            differing += 1
    assert differing, "this set has answers that bfloat16 changes"
    with capsys.disabled():
        print(f"\nbfloat16: {differing} of 100 answers differ, each from a near tie on")


def test_small_steps_and_preemptions(bases, preemptions):
    base = bases("qwen3-gqa2")
    options = {"max_num_batched_tokens": 128, "max_num_seqs": 8, "max_model_len": 256}
    options |= {"diffusion_config": {"canvas_length": 32}}
    options |= {"num_gpu_blocks_override": 22, "block_size": 16}
    with engine(base.adapter, **options) as llm:
        pages = free_pages(llm)
        assert_same(ask(llm, base.prompts(16)), base.answers(16))
        assert_idle(llm, pages)
    assert preemptions


def test_async_with_the_kernels(bases, async_scheduling, monkeypatch):
    """Triton's interpreter runs what a GPU would."""
    monkeypatch.setenv("VLLM_REFUSION_CPU_KERNELS", "interpreter")
    base = bases("qwen3-gqa2")
    with engine(base.adapter) as llm:
        assert_same(ask(llm, base.prompts(16)[:4]), base.answers(16)[:4])


def test_a_second_turn_finds_the_first_in_the_prefix_cache(bases):
    base = bases("llama-gqa4")
    prompt = base.prompts(16)[1][:100] * 2
    options = {"temperature": 0, "max_tokens": 60, "ignore_eos": True, "detokenize": False}

    def generate(llm, tokens):
        prompt = TokensPrompt(prompt_token_ids=tokens)
        return llm.generate(prompt, SamplingParams(**options), use_tqdm=False)[0]

    def converse(llm):
        first = list(generate(llm, prompt).outputs[0].token_ids)
        second = generate(llm, [*prompt, *first, 5, 6, 7])
        return [*first, *second.outputs[0].token_ids], second.num_cached_tokens

    with engine(base.path, block_size=32) as llm:
        expected, _ = converse(llm)
    with engine(base.adapter, block_size=32) as llm:
        tokens, cached = converse(llm)
    assert tokens == expected
    assert cached == (len(prompt) + 59) // 32 * 32


def test_samples_are_the_references(bases):
    base = bases("qwen3-gqa2")
    prompts = base.prompts(16)[:5]
    parameters = SamplingParams(
        n=2, temperature=0.8, seed=5, top_p=0.9, max_tokens=TOKENS, detokenize=False
    )
    with engine(base.adapter) as llm:
        answers = ask_all(llm, prompts, [parameters] * len(prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_same(answer, [base.sample(prompt, parameters, child) for child in range(2)])


class Gated:
    """The adapted model on transformers: low-rank products added on the rows of masks alone."""

    def __init__(self, base: Path, adapter: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.tensors, scale = adapter_tensors(adapter), read_adapter(adapter).scale
        self.masks = 0  # rows at the end
        for name in {key.rpartition(".")[0] for key in self.tensors if "." in key}:
            a, b = self.tensors[name + ".lora_A"], self.tensors[name + ".lora_B"]

            def add(module, arguments, output, a=a, b=b):
                first = output.shape[1] - self.masks
                output[:, first:] += scale * (arguments[0][:, first:] @ a.T @ b.T)

            self.model.model.get_submodule(name).register_forward_hook(add)

    @torch.no_grad()
    def __call__(self, tokens: list[int], positions: list[int]) -> torch.Tensor:
        """Logits of the last row; ``positions`` of the masks behind ``tokens``."""
        self.masks = len(positions)
        embedded = self.model.get_input_embeddings()(torch.tensor([tokens]))
        masks = self.tensors["mask_embedding"].expand(1, len(positions), -1)
        places = torch.tensor([[*range(len(tokens)), *positions]])
        inputs = torch.cat([embedded, masks], dim=1)
        return self.model(inputs_embeds=inputs, position_ids=places).logits[0, -1]


@pytest.mark.parametrize(
    ("name", "kind"), [("qwen3-gqa2", "adapter"), ("llama-gqa4", "partial"), ("qwen2", "adapter")]
)
def test_masks_are_computed_with_the_adapter(bases, name, kind, monkeypatch):
    """Logits of every mask that two requests feed, beside transformers'."""
    base = bases(name)
    adapter = getattr(base, kind)
    gated, plain = Gated(base.path, adapter), Gated(base.path, without_effect_of(adapter))
    prompts = [prompt[: 9 + i] for i, prompt in enumerate(p for p in base.prompts(16) if p[9:])][:2]
    seen = []

    with engine(adapter) as llm:
        model_state = model_state_of(llm)
        sampler, state = model_state.sampler, model_state.decode_state
        row_statistics = sampler._row_statistics

        def watched(hidden_states, batch):
            logits = sampler.model.row_logits(hidden_states)
            rows = zip(batch.expanded_idx_mapping.tolist(), batch.expanded_local_pos.tolist())
            for (req, row), row_logits in zip(rows, logits, strict=True):
                known = int(state.ints[req, Field.EMITTED])
                is_mask = int(state.canvas_token[req, row]) == base.vocab
                if known and is_mask and row < state.ints[req, Field.CANVAS]:
                    own, end = int(state.row_own_start[req, row]), int(state.row_run_end[req, row])
                    response = state.response[req, : known - 1].tolist()
                    seen_tokens = response + state.canvas_token[req, :end].tolist()
                    length = int(state.ints[req, Field.PROMPT_LEN])
                    prompt = next(p for p in prompts if len(p) == length)
                    positions = state.row_position[req, own : row + 1] + length
                    seen.append((prompt + seen_tokens, positions.tolist(), row_logits))
            row_statistics(hidden_states, batch)

        monkeypatch.setattr(sampler, "_row_statistics", watched)
        parameters = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, detokenize=False)
        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        llm.generate(inputs, parameters, use_tqdm=False)
    assert len(seen) > 20
    changed = 0.0
    for tokens, positions, logits in seen[::3]:
        expected = gated(tokens, positions)
        torch.testing.assert_close(logits.cpu(), expected, rtol=1e-4, atol=1e-4)
        changed = max(changed, (expected - plain(tokens, positions)).abs().max().item())
    assert changed > 0.1


class Clock:
    """As CUDA's events: each run takes as many milliseconds as masks were adapted in it."""

    masks = 0

    def __init__(self, **_):
        self.at = None

    def record(self, *_):
        self.at = self.masks

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


def test_passes_with_masks_are_timed(bases, monkeypatch):
    """Seven of eight rows are masks to every layer; steps afterwards have their own again."""
    base = bases("qwen3-gqa2")
    masks_of_step, shrinks = mask_adapter._masks_of_step, []

    def watched(count):
        masks = masks_of_step(count)
        shrinks.append(0 if masks is None else int(masks))
        Clock.masks += shrinks[-1]
        return masks

    monkeypatch.setattr(mask_adapter, "_masks_of_step", watched)
    parameters = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in base.prompts(3)]
    with engine(base.adapter) as llm:
        expected = [
            o.outputs[0].token_ids for o in llm.generate(prompts, parameters, use_tqdm=False)
        ]
        drafted = model_state_of(llm).decode_state.counters[Counter.DRAFTS_PASSED].item()
        state, run = model_state_of(llm), model_runner_of(llm)._dummy_run
        device = SimpleNamespace(type="cuda")
        monkeypatch.setattr(torch.cuda, "Event", Clock)
        shrinks.clear()
        run(64)
        each = len(shrinks)  # of a pass
        cost = state._measure_drafting(run, device)
        assert cost.milliseconds == tuple(each * rows * 7 / 8 for rows in cost.rows)
        assert measure_passes(run, 128, device).milliseconds[0] == 0
        again = [o.outputs[0].token_ids for o in llm.generate(prompts, parameters, use_tqdm=False)]
        assert state.decode_state.counters[Counter.DRAFTS_PASSED].item() > drafted
    assert again == expected


class Product:
    """As vLLM's methods of linear layers; gives a view."""

    def apply(self, layer, x, bias=None):
        return torch.nn.functional.linear(x, layer.weight).view(-1, 40)


class Layer(torch.nn.Module):
    """As vLLM's linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(40, 24))
        self.quant_method = mask_adapter._OnMaskRows(Product(), 0.5, [0, 30, 30, 10])

    def forward(self, x):
        return self.quant_method.apply(self, x)


def test_compiled_layers_are_adapted_too(monkeypatch):
    """Operations that change a tensor in place survive the compiler, as does the hook."""
    metadata = {"layer": SimpleNamespace(feeds_masks=True)}
    context = SimpleNamespace(attn_metadata=metadata)
    monkeypatch.setattr(mask_adapter, "get_forward_context", lambda: context)
    masks = mask_adapter.MaskRows(5, torch.device(DEVICE))
    masks.rows[:2], masks.count[:] = torch.tensor([1, 3]), 2
    embedding, layer = torch.nn.Embedding(10, 24), Layer()
    embedding.register_buffer("mask_embedding", torch.randn(24))
    embedding.register_forward_hook(mask_adapter._embed)
    layer.register_buffer("mask_lora_a", torch.randn(2, 16, 24))
    layer.register_buffer("mask_lora_b", torch.randn(40, 16))
    masks.share_with(embedding)
    masks.share_with(layer)
    model = torch.nn.Sequential(embedding, layer).to(DEVICE)
    tokens = torch.tensor([1, 0, 2, 0, 4], device=DEVICE)
    with torch.no_grad():
        expected = model(tokens)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens)
        plain = torch.nn.functional.linear(embedding.weight[tokens], layer.weight)
    torch.testing.assert_close(compiled, expected)
    differs = (expected - plain).abs().amax(1) > 1
    assert differs.tolist() == [False, True, False, True, False]
    metadata["layer"].feeds_masks = False
    with torch.no_grad():
        plain, of_one = model(torch.arange(5, device=DEVICE)), layer(embedding.weight[1:2])
    torch.testing.assert_close(plain[1:2], of_one)


def of_rank(kind, rank: int, ranks: int, **sizes) -> torch.nn.Module:
    """A layer of vLLM's with what tells its part of the outputs or inputs, and nothing else."""
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    layer.tp_rank, layer.tp_size, layer.quant_method = rank, ranks, None
    for name, size in sizes.items():
        setattr(layer, name, size)
    return layer


def delta(layer, x: torch.Tensor, out: int) -> torch.Tensor:
    """What the adapter adds to all rows of a layer's output, of ``out`` columns."""
    y, rows = torch.zeros(len(x), out), torch.arange(len(x)).int()
    count, method = torch.tensor([len(x)]).int(), layer.quant_method
    parts = allocate_parts(x, layer.mask_lora_a)
    shrink_masks_twin(parts, x, layer.mask_lora_a, rows, count)
    expand_masks_twin(y, parts, layer.mask_lora_b, rows, count, method.scale, method.blocks)
    return y


def test_ranks_have_their_parts(bases):
    """Four ranks, two KV heads: outputs of columns side by side, sums over rows' inputs."""
    adapter = read_adapter(bases("qwen3-gqa2").adapter)  # rank 4, scale 2
    like = {"dtype": torch.float32, "device": "cpu"}
    torch.manual_seed(0)
    x, heads, keys, head = torch.randn(5, 24), 8, 2, 6
    outs = {"q": heads * head, "k": keys * head, "v": keys * head}
    pairs = [(i, torch.randn(4, 24), torch.randn(out, 4)) for i, out in enumerate(outs.values())]
    whole = [2 * x @ a.T @ b.T for _, a, b in pairs]
    for rank in range(4):
        widths = [heads // 4 * head, head, head]
        layer = of_rank(
            QKVParallelLinear, rank, 4, output_partition_sizes=widths, input_size=24,
            num_kv_head_replicas=2,
        )  # fmt: skip
        mask_adapter._adapt(adapter, "qkv", layer, pairs, like)
        part = rank // 2
        mine = [
            whole[0][:, rank * widths[0] :][:, : widths[0]],
            *(of_keys[:, part * head : (part + 1) * head] for of_keys in whole[1:]),
        ]
        torch.testing.assert_close(delta(layer, x, sum(widths)), torch.cat(mine, dim=1))

    a, b = torch.randn(4, 24), torch.randn(7, 4)
    total = torch.zeros(5, 7)
    for rank in range(4):
        layer = of_rank(RowParallelLinear, rank, 4, output_size=7, input_size=24)
        mask_adapter._adapt(adapter, "o", layer, [(0, a, b)], like)
        total += delta(layer, x[:, rank * 6 : (rank + 1) * 6], 7)
    torch.testing.assert_close(total, 2 * x @ a.T @ b.T)

    layer = of_rank(RowParallelLinear, 0, 4, output_size=8, input_size=24)
    with pytest.raises(ValueError, match=r"o: lora_B has the shape \[7, 4\].*needs \[8, 4\]"):
        mask_adapter._adapt(adapter, "o", layer, [(0, a, b)], like)


def without_effect_of(adapter: Path) -> Path:
    """A copy beside ``adapter`` whose products are zero."""
    copied = adapter.with_name(adapter.name + "-off")
    if not copied.exists():
        copied.mkdir()
        for name in (CONFIG, TENSORS):
            (copied / name).write_bytes((adapter / name).read_bytes())
        without_effect(copied)
    return copied


def rewrite(adapter: Path, folder: Path, **values) -> Path:
    """A copy of ``adapter`` with other values in its configuration."""
    folder.mkdir()
    config = json.loads((adapter / CONFIG).read_text())
    config["base_model_name_or_path"] = str(adapter.parent / "base")
    (folder / CONFIG).write_text(json.dumps(config | values))
    (folder / TENSORS).write_bytes((adapter / TENSORS).read_bytes())
    return folder


def test_another_model_than_its_base_is_refused(bases, tmp_path):
    base, other = bases("qwen3-gqa2"), bases("llama-gqa4")
    moved = rewrite(base.adapter, tmp_path / "moved", base_model_name_or_path=str(other.path))
    with pytest.raises(ValueError, match="is an adapter of another model"):
        with engine(moved):
            pass
    option = {"refusion_adapter": str(base.adapter)}
    with pytest.raises(ValueError, match="is an adapter of another model"):
        with engine(other.path, additional_config=option):
            pass


def test_a_checkpoint_of_refusion_is_no_base_of_another_adapter(bases, tiny_checkpoint):
    option = {"refusion_adapter": str(bases("qwen3-gqa2").adapter)}
    with pytest.raises(ValueError, match="is an adapter of another model"):
        with engine(tiny_checkpoint, additional_config=option):
            pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"additional_config": {"refusion_adapter": 7}}, "refusion_adapter=7: allowed is"),
        ({"additional_config": {"refusion_adapter": "."}}, "adapter_config.json"),
        ({"hf_overrides": {"mask_token_id": 5}}, "mask_token_id=5: beside a mask adapter"),
        ({"override_generation_config": {"mode": "parallel"}}, "mode='parallel'.*mask adapter"),
        ({"override_generation_config": {"slot_start": "mask"}}, "slot_start='mask'.*mask adapter"),
    ],
    ids=str,
)
def test_options_that_are_refused(bases, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = bases("qwen3-gqa2")
    model = base.path if "additional_config" in options else base.adapter
    with pytest.raises(ValueError, match=message):
        with engine(model, **options):
            pass


def test_an_adapter_as_model_and_as_option_is_refused(bases):
    base = bases("qwen3-gqa2")
    option = {"refusion_adapter": str(base.zeros)}
    with pytest.raises(ValueError, match="allowed is one of them"):
        with engine(base.adapter, additional_config=option):
            pass


def test_requests_that_are_refused(bases):
    base = bases("qwen3-gqa2")
    with engine(base.adapter, additional_config={"refusion_schedule": "plain"}) as llm:
        assert llm.llm_engine.model_config.served_model_name == str(base.adapter)

        def refused(message, prompt=(1, 2), **options):
            parameters = SamplingParams(max_tokens=5, detokenize=False, **options)
            with pytest.raises(VLLMValidationError, match=message):
                llm.generate(TokensPrompt(prompt_token_ids=list(prompt)), parameters)

        refused("mode='parallel'.*mask adapter", extra_args={"mode": "parallel"})
        both = {"mode": "parallel", "block_length": 64}
        refused("mode='parallel'.*mask adapter", extra_args=both)
        refused("block_length=64.*no effect", extra_args={"block_length": 64})
        refused("slot_start", extra_args={"slot_start": "mask"})
        # vLLM 0.33 looks at token ids itself, without a tokenizer too
        outside = f"prompt={base.vocab} is not supported|id {base.vocab} is out of vocabulary"
        refused(outside, prompt=(1, base.vocab))
        alone = ask(llm, base.prompts(16), extra_args={"mode": "serial", "slot_size": 8})
    assert_same(alone, base.answers(16))

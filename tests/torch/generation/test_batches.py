# SPDX-License-Identifier: Apache-2.0
"""Many requests at once give what each gives alone, whatever the pages, and one's fault is its own."""

import threading

import pytest
import torch

import pretrained
from pretrained.core.batching_config import ContinuousBatchingConfig
from pretrained.core.generation_config import GenerationConfig
from pretrained.errors import GenerationError, NotYetError
from pretrained.torch.generation.batch_engine import BatchEngine, page_nbytes
from pretrained.torch.generation.batch_requests import Requests, RequestStatus

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
FAMILIES = {
    "LlamaForCausalLM": GROUPED,
    "MistralForCausalLM": {**GROUPED, "sliding_window": 7},
    "Qwen2ForCausalLM": {**GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Qwen3ForCausalLM": {**GROUPED, "head_dim": 16},
    "SmolLM3ForCausalLM": GROUPED,
    "GPT2LMHeadModel": {
        "vocab_size": 61,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "BertLMHeadModel": {**SIZES, "is_decoder": True},
}
BATCHINGS = [
    {},
    {"page_size": 4, "max_batch_tokens": 16, "max_requests_per_batch": 5},
    # So few pages that rows are sent out and computed again.
    {"page_size": 4, "num_blocks": 30},
    {"page_size": 8, "num_blocks": 16, "allow_block_sharing": False, "max_batch_tokens": 7},
]


def build(name, **more):
    cls = getattr(pretrained, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**FAMILIES[name], **more})).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def llama():
    return build("LlamaForCausalLM")


def random_prompts(count=15, longest=60, shared=21):
    generator = torch.Generator().manual_seed(1)
    beginning = torch.randint(3, 61, (shared,), generator=generator).tolist()
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    ends = [torch.randint(3, 61, (length,), generator=generator).tolist() for length in lengths]
    return [(beginning if index % 3 == 0 else []) + end for index, end in enumerate(ends)]


def alone(model, prompt, seed=None, **settings):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    ids = model.generate(torch.tensor([prompt]), generator=generator, **settings)
    return ids[0, len(prompt) :].tolist()


def engine_and_rows(model, prompts, batching, **settings):
    config = ContinuousBatchingConfig(**batching)
    engine, requests = BatchEngine(model, config), Requests(model, None, settings, config)
    rows = [requests.row(prompt) for prompt in prompts]
    for row in rows:
        engine.add(row)
    return engine, rows


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_each_request_alone(name):
    model, prompts = build(name), random_prompts()
    lengths = [1 + 7 * index % 40 for index in range(len(prompts))]
    expected = [alone(model, one, max_new_tokens=n) for one, n in zip(prompts, lengths, strict=True)]
    for batching in BATCHINGS:
        found = model.generate_batch(
            prompts,
            continuous_batching_config=batching,
            per_request=[{"max_new_tokens": n} for n in lengths],
        )
        assert list(found) == [f"req_{index}" for index in range(len(prompts))]
        assert [one.generated_tokens for one in found.values()] == expected, batching
        assert all(one.status is RequestStatus.FINISHED and one.error is None for one in found.values())


@pytest.mark.parametrize("attention", ["eager", "sdpa", "own"])
def test_the_models_own_attention_is_used(attention):
    if attention == "own":
        pretrained.AttentionInterface.register("own", pretrained.AttentionInterface()["eager"])
    model, prompts = build("MistralForCausalLM", attn_implementation=attention), random_prompts(6)
    expected = [alone(model, prompt, max_new_tokens=12) for prompt in prompts]
    found = model.generate_batch(prompts, continuous_batching_config={"page_size": 4}, max_new_tokens=12)
    assert [one.generated_tokens for one in found.values()] == expected


def test_tokens_equal_transformers_batches(llama):
    transformers = pytest.importorskip("transformers")
    from support.oracle import transformers_twin

    twin = transformers_twin(llama, "sdpa")
    prompts = random_prompts(8)
    config = transformers.GenerationConfig(
        max_new_tokens=10, do_sample=False, eos_token_id=2, pad_token_id=0, bos_token_id=1
    )
    expected = twin.generate_batch(
        prompts,
        generation_config=config,
        continuous_batching_config=transformers.ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64),
        warmup=False,
    )
    found = llama.generate_batch(prompts, max_new_tokens=10)
    assert [one.generated_tokens for one in found.values()] == [
        one.generated_tokens for one in expected.values()
    ]


def test_rules_and_ends_are_each_requests_own(llama):
    prompts = random_prompts(6)
    own = [
        {"max_new_tokens": 20, "repetition_penalty": 1.8},
        {"max_new_tokens": 20, "eos_token_id": [5, 9, 30, 41, 50]},
        {"max_new_tokens": 20, "no_repeat_ngram_size": 2, "suppress_tokens": [4, 7]},
        {"max_length": len(prompts[3]) + 3},
        {"min_new_tokens": 15, "max_new_tokens": 20, "eos_token_id": list(range(2, 50))},
        {},
    ]
    expected = [alone(llama, one, **settings) for one, settings in zip(prompts, own, strict=True)]
    found = llama.generate_batch(prompts, per_request=own)
    assert [one.generated_tokens for one in found.values()] == expected


def test_samples_are_repeatable_by_seed(llama):
    prompts = random_prompts(6)
    settings = {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.4, "max_new_tokens": 12}
    expected = [alone(llama, one, seed=7 + index, **settings) for index, one in enumerate(prompts)]
    seeds = [{"seed": 7 + index} for index in range(6)]
    for batching in (*BATCHINGS, {"seed": 7}):
        own = None if "seed" in batching else seeds
        found = llama.generate_batch(
            prompts, continuous_batching_config=batching, per_request=own, **settings
        )
        assert [one.generated_tokens for one in found.values()] == expected

    def run():
        torch.manual_seed(5)
        return [one.generated_tokens for one in llama.generate_batch(prompts, **settings).values()]

    assert run() == run() != expected


def test_logprobs_are_of_the_tokens(llama):
    prompts = random_prompts(3)
    found = llama.generate_batch(
        prompts, continuous_batching_config={"return_logprobs": True}, max_new_tokens=4
    )
    for prompt, one in zip(prompts, found.values(), strict=True):
        result = llama.generate(
            torch.tensor([prompt]), max_new_tokens=4, return_dict_in_generate=True, output_scores=True
        )
        scores = llama.compute_transition_scores(result.sequences, result.scores, normalize_logits=True)
        torch.testing.assert_close(torch.tensor(one.logprobs), scores[0], rtol=1e-4, atol=1e-4)


# -- pages ------------------------------------------------------------------------------------------


def test_rows_are_sent_out_and_come_back(llama):
    prompts = random_prompts(6, longest=12, shared=0)
    expected = [alone(llama, prompt, max_new_tokens=30) for prompt in prompts]
    engine, rows = engine_and_rows(
        llama, prompts, {"page_size": 4, "num_blocks": 16, "allow_block_sharing": False}, max_new_tokens=30
    )
    while not engine.is_idle:
        engine.step()
    assert engine.preemptions > 0
    assert [row.tokens[row.prompt_length :] for row in rows] == expected
    assert engine.pages.held == 0


def test_a_shared_beginning_is_computed_once(llama):
    beginning = list(range(3, 51))
    prompts = [[*beginning, 51 + index, 52] for index in range(5)]
    engine, rows = engine_and_rows(llama, prompts, {"page_size": 16}, max_new_tokens=8)
    engine.step()
    # All in one step: 50 tokens of the first, two of each other.
    assert engine.cache._step.tokens == 50 + 4 * 2
    assert engine.pages.held == 3 + 5
    while not engine.is_idle:
        engine.step()
    for prompt, row in zip(prompts, rows, strict=True):
        assert row.tokens[50:] == alone(llama, prompt, max_new_tokens=8)
    # A later one finds it too.
    again = Requests(llama, None, {"max_new_tokens": 8}, engine.config).row(prompts[0])
    engine.add(again)
    engine.step()
    assert engine.cache._step.tokens == 2


def test_a_long_prompt_does_not_hold_up_the_others(llama):
    engine, rows = engine_and_rows(
        llama, [[5, 6, 7], list(range(3, 60)) * 2], {"max_batch_tokens": 16}, max_new_tokens=10
    )
    lengths = []
    for _ in range(5):
        engine.step()
        lengths.append((len(rows[0].tokens), rows[1].computed))
    assert lengths == [(4, 13), (5, 28), (6, 43), (7, 58), (8, 73)]


def test_memory_is_bounded(llama):
    each = page_nbytes(llama, 4)
    batching = {"page_size": 4, "max_memory": 20 * each}
    engine, _ = engine_and_rows(llama, random_prompts(9, longest=30), batching, max_new_tokens=20)
    while not engine.is_idle:
        engine.step()
        assert engine.cache.nbytes <= 20 * each
    with pytest.raises(GenerationError, match="no room for a single page"):
        llama.generate_batch([[3]], continuous_batching_config={"max_memory": each // 8})
    with pytest.raises(
        GenerationError, match=r"needs more pages than there may be \(request req_1\).*found 25"
    ):
        llama.generate_batch([[3], [3]], continuous_batching_config=batching,
                             per_request=[{}, {"max_new_tokens": 100}])  # fmt: skip


# -- faults -----------------------------------------------------------------------------------------


def test_a_rule_that_raises_costs_its_own_request_only(llama):
    prompts = random_prompts(5)

    def rule(ids, scores):
        if ids.shape[1] == len(prompts[2]) + 3 and ids[0, : len(prompts[2])].tolist() == prompts[2]:
            raise RuntimeError("no more of this")
        return scores

    found = list(llama.generate_batch(prompts, logits_processor=[rule], max_new_tokens=9).values())
    assert found[2].status is RequestStatus.FAILED
    assert found[2].error == "RuntimeError: no more of this"
    assert len(found[2].generated_tokens) == 3
    for index in (0, 1, 3, 4):
        assert found[index].generated_tokens == alone(llama, prompts[index], max_new_tokens=9)


def test_scores_that_are_not_numbers_cost_their_own_request_only():
    model = build("LlamaForCausalLM")
    # A token that poisons whatever looks at it.
    model.model.embed_tokens.weight.data[60] = float("nan")
    prompts = [[5, 6, 7, 8, 9], [10, 60, 11], [12, 13, 14]]
    own = [{"max_new_tokens": 24}] * 3
    kept = {"suppress_tokens": [60], "eos_token_id": None}
    expected = [alone(model, prompts[index], max_new_tokens=24, **kept) for index in (0, 2)]
    found = list(
        model.generate_batch(
            prompts * 3,
            continuous_batching_config={"page_size": 4, "max_requests_per_batch": 3, "num_blocks": 24},
            per_request=own * 3,
            **kept,
        ).values()
    )
    for index, one in enumerate(found):
        if index % 3 == 1:
            assert one.status is RequestStatus.FAILED and "not numbers (step 0)" in one.error
        else:
            assert one.generated_tokens == expected[(index % 3) // 2]


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[3], []], {}, r"The prompt is empty \(inputs, request req_1\)"),
        ([[3, 61]], {}, r"Token id 61 is outside the vocabulary \(inputs, request req_0, row 0, pos"),
        (["text"], {}, r"there is no tokenizer .*Pass tokenizer="),
        ([{"input_ids": [3]}], {}, r"must be token ids or a text .*found dict"),
        ([[3.5]], {}, r"must be token ids or a text .*found \[3.5\]"),
        ([torch.ones(2, 3, dtype=torch.long)], {}, r"A request is one prompt .*without padding"),
        ([[3]], {"num_return_sequences": 2, "do_sample": True}, r"num_return_sequences=2 .*as often as"),
        ([[3]], {"output_scores": True}, r"output_scores=True cannot be obeyed.*Use generate\(\)"),
        ([[3]], {"cache_implementation": "static"}, r"keeps keys and values in pages .*expected \"paged\""),
        ([[3]], {"attention_mask": torch.ones(1, 1)}, r"does not take 'attention_mask'"),
        ([[3]], {"stop_strings": "x"}, r"there is no tokenizer"),
        ([[3]], {"max_new_token": 3}, r"Did you mean 'max_new_tokens'"),
        ([[3]], {"per_request": [{"max_new_token": 3}]}, r"A request has no setting 'max_new_token'"),
        ([[3]], {"per_request": []}, r"expected 1 mappings, found 0"),
        ([[3]], {"continuous_batching_config": 3}, r"continuous_batching_config has the wrong type"),
        ([[3], [4]], {"per_request": [{"request_id": "a"}] * 2}, r"same name \(request_id\): found a"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_runs(llama, monkeypatch, prompts, settings, message):
    monkeypatch.setattr(llama, "forward", None)
    with pytest.raises(GenerationError, match=message):
        llama.generate_batch(prompts, **settings)


def test_what_is_not_served_is_refused_by_name(llama):
    with pytest.raises(NotYetError, match=r"contrastive_search cannot be run|penalty_alpha"):
        llama.generate_batch([[3]], penalty_alpha=0.5, top_k=4)
    t5 = pretrained.T5ForConditionalGeneration(
        pretrained.T5Config(vocab_size=9, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
    )
    with pytest.raises(NotYetError, match=r"T5For.* reads an encoder's output.*Use generate\(\) with padded"):
        t5.generate_batch([[3]])
    stretched = build("LlamaForCausalLM", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(NotYetError, match="stretched by the longest row"):
        stretched.generate_batch([[3]])
    with pytest.raises(GenerationError, match=r"Call generate_batch\(\) with the prompts"):
        llama.generate(torch.tensor([[3]]), cache_implementation="paged")


# -- an iterator ------------------------------------------------------------------------------------


def test_answers_come_as_they_are_finished_and_prompts_are_taken_lazily(llama):
    taken = []

    def inputs():
        for index in range(40):
            taken.append(index)
            yield {"prompt": [3 + index, 4], "request_id": str(index), "max_new_tokens": 1 + index % 4,
                   "eos_token_id": None} if index != 6 else {"prompt": [999]}  # fmt: skip

    names, most = [], 0
    for one in llama.iter_batch(inputs(), continuous_batching_config={"max_requests_per_batch": 4}):
        names.append(one.request_id)
        most = max(most, len(taken) - len(names))
        if one.request_id == "req_6":
            assert one.status is RequestStatus.FAILED and "999 is outside" in one.error
        else:
            index = int(one.request_id)
            expected = alone(llama, [3 + index, 4], max_new_tokens=1 + index % 4, eos_token_id=None)
            assert one.generated_tokens == expected
    assert sorted(names, key=lambda n: int(n.strip("req_"))) == [
        "req_6" if index == 6 else str(index) for index in range(40)
    ]
    assert most <= 12


# -- the manager ------------------------------------------------------------------------------------


def test_a_manager_answers_what_comes(llama):
    prompts = random_prompts(6)
    expected = {f"mine {i}": alone(llama, one, max_new_tokens=8 + i) for i, one in enumerate(prompts)}
    with llama.continuous_batching_context_manager() as manager:
        for index, prompt in enumerate(prompts):
            manager.add_request(prompt, f"mine {index}", max_new_tokens=8 + index, record_timestamps=True)
        late = manager.get_result("mine 5", timeout=30)
        found = {late.request_id: late.generated_tokens}
        for _ in range(5):
            one = manager.get_result(timeout=30)
            found[one.request_id] = one.generated_tokens
            assert len(one.timestamps) == len(one.generated_tokens)
            assert one.created_time <= one.lifespan[0] < one.timestamps[0] <= one.lifespan[1]
        assert manager.get_result(timeout=0.01) is None
    assert found == expected
    assert not manager.is_running()
    with pytest.raises(GenerationError, match="takes no more requests"):
        manager.add_request(prompts[0])


def test_a_request_streams_its_tokens(llama):
    with llama.continuous_batching_context_manager(max_new_tokens=5, eos_token_id=None) as manager:
        name = manager.add_request([5, 6], streaming=True)
        parts = [one.generated_tokens for one in manager.request_id_iter(name)]
    assert parts == [parts[-1][:count] for count in range(1, 6)]


def test_leaving_the_block_waits_for_all_answers(llama):
    with llama.continuous_batching_context_manager(max_new_tokens=30, eos_token_id=None) as manager:
        names = manager.add_requests(random_prompts(5))
    assert sorted(one.request_id for one in manager) == names


def test_cancelled_requests_end_and_the_others_do_not(llama):
    prompts = random_prompts(4)
    manager = llama.init_continuous_batching(max_new_tokens=60, eos_token_id=None)
    names = manager.add_requests(prompts)
    began = threading.Event()
    manager.register_result_handler(manager.add_request([9], streaming=True), lambda one: began.set())
    manager.start()
    assert began.wait(30)
    manager.cancel_request(names[1])
    manager.cancel_request("nobody")
    manager.stop()
    found = {one.request_id: one for one in manager}
    assert sorted(found) == names
    assert found[names[1]].status is RequestStatus.CANCELLED
    assert len(found[names[1]].generated_tokens) < 60
    for index in (0, 2, 3):
        assert found[names[index]].generated_tokens == alone(
            llama, prompts[index], max_new_tokens=60, eos_token_id=None
        )
    assert manager.engine.pages.held == 0


def test_a_hard_stop_fails_what_is_left(llama):
    manager = llama.init_continuous_batching(max_new_tokens=100, eos_token_id=None)
    names = manager.add_requests(random_prompts(3, longest=9, shared=0))
    manager.start()
    manager.stop(hard_stop=True)
    found = {one.request_id: one for one in manager}
    assert sorted(found) == names
    assert all("manager was stopped" in one.error for one in found.values())


def test_a_step_that_fails_is_told_and_the_manager_goes_on(monkeypatch, caplog):
    model = build("LlamaForCausalLM")
    forward, calls = model.forward, []

    def broken(**arguments):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return forward(**arguments)

    monkeypatch.setattr(model, "forward", broken)
    with model.continuous_batching_context_manager(max_new_tokens=6, eos_token_id=None) as manager:
        manager.add_request([5, 6], "lost")
        assert manager.get_result(timeout=30).error == "RuntimeError: out of memory"
        manager.add_request([5, 6], "kept")
        assert len(manager.get_result(timeout=30).generated_tokens) == 6
    assert "the requests that were running are lost" in caplog.text


def test_a_queue_with_a_bound_makes_adding_wait(llama):
    with llama.continuous_batching_context_manager(
        continuous_batching_config={"max_queue_size": 1, "max_requests_per_batch": 1}, max_new_tokens=3
    ) as manager:
        names = manager.add_requests([[3 + index] for index in range(6)])
        assert len({manager.get_result(timeout=30).request_id for _ in names}) == 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_tokens():
    model, prompts = build("MistralForCausalLM"), random_prompts()
    expected = [alone(model, prompt, max_new_tokens=12) for prompt in prompts]
    found = model.cuda().generate_batch(
        prompts, continuous_batching_config={"page_size": 4, "num_blocks": 30}, max_new_tokens=12
    )
    assert [one.generated_tokens for one in found.values()] == expected


def test_weights_on_disk_serve_too(tmp_path, llama):
    llama.save_pretrained(tmp_path)
    model = pretrained.LlamaForCausalLM.from_pretrained(
        tmp_path, device_map={"model.layers.0": "cpu", "": "disk"}, dtype=torch.float32
    )
    prompts = random_prompts(5)
    expected = llama.generate_batch(prompts, max_new_tokens=6)
    found = model.generate_batch(prompts, max_new_tokens=6)
    assert [one.generated_tokens for one in found.values()] == [
        one.generated_tokens for one in expected.values()
    ]


# -- texts and real weights -------------------------------------------------------------------------


@pytest.mark.realweights
def test_texts_end_at_stop_strings(smollm2_gguf):
    tokenizer = pretrained.AutoTokenizer.from_pretrained(smollm2_gguf)
    model = pretrained.AutoModelForCausalLM.from_pretrained(smollm2_gguf, dtype=torch.float32)
    prompts = [
        "One, two, three,",
        "The capital of France is",
        "Monday, Tuesday,",
        "def add(a, b):\n    return",
        "A very short story about a dog. Once upon a time there was a dog who",
    ]
    own = [{}, {"stop_strings": "Paris"}, {"stop_strings": ["Friday", "xyz"]}, {}, {"max_new_tokens": 24}]
    config = GenerationConfig(max_new_tokens=12)
    found = model.generate_batch(prompts, config, {"page_size": 8}, tokenizer=tokenizer, per_request=own)
    for prompt, mine, one in zip(prompts, own, found.values(), strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected = model.generate(ids, config, tokenizer=tokenizer, **mine)[0, ids.shape[1] :]
        assert one.generated_tokens == expected.tolist()
        assert one.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert list(found.values())[1].text.endswith("Paris")

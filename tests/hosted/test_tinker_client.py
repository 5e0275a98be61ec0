"""Tinker's own client, unmodified, against a server of a small random model on this machine."""

import contextlib
import gc
import io
import json
import random
import tarfile
import threading

import httpx
import numpy as np
import pytest
import tinker
import torch
from support.hosted import hosted, routes_of
from support.runs import write_model
from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto

from ftjax import tree
from ftjax.hosted.refusals import Refused
from ftjax.hosted.tinker import bodies
from ftjax.hosted.tinker.training import Programs, Shape, prompt_logps
from ftjax.hosted.tinker.work import Failed
from ftjax.weights.peft.adapter import open_adapter

# The client leaves connections open that it asked for its config by.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

SIZES = {"model.dtype": "float32", "model.param_dtype": "float32", "generation.slots": 4, "generation.max_length": 128}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("tinker")
    source = str(write_model(root / "model", tie_word_embeddings=False))
    with hosted(root / "serve", **{"model.source": source, "limits.requests_per_minute": 100_000}, **SIZES) as server:
        server.source = source
        yield server


@pytest.fixture(autouse=True)
def _nothing_left_for_other_tests():
    yield
    gc.collect()


@contextlib.contextmanager
def client_of(server, user="anna"):
    client = tinker.ServiceClient(base_url=server.url, api_key=server.key(user))
    try:
        yield client
    finally:
        client.close("success").result()


@pytest.fixture
def client(server):
    with client_of(server) as client:
        yield client


def rest_of(server, user="anna"):
    return tinker.RestClient(base_url=server.url, api_key=server.key(user))


def datum(tokens: list[int], weights: list[float] | None = None) -> types.Datum:
    """What follows each token; all of it counts without `weights`."""
    inputs = {"target_tokens": tokens[1:], "weights": weights or [1.0] * (len(tokens) - 1)}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


SENTENCES = [datum([5, 9, 13, 17, 21, 25]), datum([7, 9, 11, 13]), datum(list(range(40, 80)))]
FAST = types.AdamParams(learning_rate=3e-2)


def logps_of(training, data=SENTENCES) -> list[np.ndarray]:
    result = training.forward(data, "cross_entropy").result()
    return [output["logprobs"].to_numpy() for output in result.loss_fn_outputs]


def test_what_the_server_has(server):
    [model] = rest_of(server).get_server_capabilities().result().supported_models
    assert (model.model_name, model.max_context_length, model.trainable) == (server.source, 512, True)


def test_a_supervised_loop(client, server):
    training = client.create_lora_training_client(base_model=server.source, rank=8, seed=1).result()
    info = training.get_info()
    assert (info.lora_rank, info.model_data.model_name, info.is_lora) == (8, server.source, True)
    assert training.get_tokenizer().encode("the lamp")
    losses = []
    for _ in range(4):
        both = training.forward_backward(SENTENCES, "cross_entropy"), training.optim_step(FAST)
        result, step = (future.result() for future in both)
        losses.append(result.metrics["loss:sum"])
        assert step.metrics["grad_norm"] > 0
        for its, output in zip(SENTENCES, result.loss_fn_outputs, strict=True):
            logps, elementwise = (output[name].to_numpy() for name in ("logprobs", "elementwise_loss"))
            assert len(logps) == its.model_input.length
            np.testing.assert_array_equal(elementwise, -logps)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


def test_a_loss_of_ones_own(client, server):
    """What `forward_backward_custom` differentiates here gives the steps of the loss that is built in."""
    built, own = (client.create_lora_training_client(server.source, rank=4, seed=2).result() for _ in range(2))

    def nll(data, logps):
        return -torch.cat(logps).sum(), {"tokens": float(len(torch.cat(logps)))}

    for _ in range(2):
        expected = built.forward_backward(SENTENCES, "cross_entropy").result()
        result = own.forward_backward_custom(SENTENCES, nll).result()
        np.testing.assert_allclose(result.metrics["loss:sum"], expected.metrics["loss:sum"], rtol=1e-5)
        assert result.metrics["tokens"] == 47
        for training in (built, own):
            training.optim_step(types.AdamParams(learning_rate=1e-2, eps=1e-4)).result()
    for one, other in zip(logps_of(built), logps_of(own), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_loop_of_reinforcement(client, server):
    """Samples, rewards those with low tokens, and learns: the share of these rises."""
    training = client.create_lora_training_client(base_model=server.source, rank=8, seed=3).result()
    prompt, params = [5, 6, 7], types.SamplingParams(max_tokens=6, stop=[], temperature=1.0)
    shares = []
    for turn in range(5):
        sampling = training.save_weights_and_get_sampling_client().result()
        drawn = params.model_copy(update={"seed": turn})
        found = sampling.sample(types.ModelInput.from_ints(prompt), 24, drawn).result()
        assert len({sequence.sequence_id for sequence in found.sequences}) == 24
        rewards = np.array([np.mean([token < 200 for token in sequence.tokens]) for sequence in found.sequences])
        shares.append(rewards.mean())
        data = []
        for sequence, advantage in zip(found.sequences, rewards - rewards.mean(), strict=True):
            assert len(sequence.tokens) == len(sequence.logprobs) == 6
            before = len(prompt) - 1
            inputs = {
                "target_tokens": prompt[1:] + sequence.tokens,
                "logprobs": [0.0] * before + sequence.logprobs,
                "advantages": [0.0] * before + [float(advantage)] * 6,
            }
            whole = types.ModelInput.from_ints(prompt + sequence.tokens[:-1])
            data.append(types.Datum(model_input=whole, loss_fn_inputs=inputs))
        result = training.forward_backward(data, "importance_sampling").result()
        training.optim_step(FAST).result()
        # What is trained says of a sample what was said when it was drawn.
        for sequence, output in zip(found.sequences, result.loss_fn_outputs, strict=True):
            np.testing.assert_allclose(output["logprobs"].to_numpy()[before:], sequence.logprobs, atol=1e-4)
    assert shares[-1] > shares[0] + 0.15, shares


def test_what_is_saved_goes_on_bit_by_bit(client, server):
    training = client.create_lora_training_client(base_model=server.source, rank=4, seed=4).result()
    training.forward_backward(SENTENCES, "cross_entropy").result()
    training.optim_step(FAST).result()
    path = training.save_state("first", user_metadata={"why": "a test"}).result().path
    assert path == f"tinker://{training.model_id}/weights/first"
    with client_of(server) as later:
        whole = later.create_training_client_from_state_with_optimizer(path).result()
        alone = later.create_training_client_from_state(path).result()
        assert whole.get_info().lora_rank == 4
        for one in (training, whole, alone):
            one.forward_backward(SENTENCES, "cross_entropy").result()
            one.optim_step(FAST).result()
        ours, theirs, other = logps_of(training), logps_of(whole), logps_of(alone)
    for one, same in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, same)
    assert any((one != different).any() for one, different in zip(ours, other, strict=True))  # whose moments are new
    with pytest.raises(tinker.RequestFailedError, match="use another name, delete it, or say overwrite"):
        training.save_state("first").result()
    assert training.save_state("first", overwrite=True).result().path == path


def test_checkpoints_are_listed_kept_for_a_time_and_deleted(client, server, tmp_path):
    training = client.create_lora_training_client(base_model=server.source, rank=4).result()
    state = training.save_state("s", ttl_seconds=3600).result().path
    weights = training.save_weights_for_sampler("w", user_metadata={"step": "0"}).result().path
    rest = rest_of(server)
    found = rest.list_checkpoints(training.model_id).result().checkpoints
    assert [(its.tinker_path, its.checkpoint_type) for its in found] == [(weights, "sampler"), (state, "training")]
    assert found[0].user_metadata == {"step": "0"}
    assert (found[1].expires_at - found[1].time).total_seconds() == 3600
    assert found[1].size_bytes > found[0].size_bytes > 1000
    rest.set_checkpoint_ttl_from_tinker_path(state, None).result()
    assert rest.list_user_checkpoints().result().checkpoints[1].expires_at is None
    info = rest.get_weights_info_by_tinker_path(weights).result()
    assert (info.base_model, info.lora_rank, info.train_mlp) == (server.source, 4, True)
    run = rest.get_training_run(training.model_id).result()
    assert (run.last_checkpoint.tinker_path, run.last_sampler_checkpoint.tinker_path) == (state, weights)
    assert rest.list_training_runs().result().training_runs[0].training_run_id == training.model_id
    rest.delete_checkpoint_from_tinker_path(state).result()
    assert [its.tinker_path for its in rest.list_checkpoints(training.model_id).result().checkpoints] == [weights]
    with pytest.raises(tinker.NotFoundError, match="there is no checkpoint"):
        rest.get_weights_info_by_tinker_path(state).result()


def test_logprobs_of_prompts_and_the_likeliest(client, server):
    """What the sampler says of a prompt is what training says; and an adapter by its name is the one that was saved."""
    training = client.create_lora_training_client(base_model=server.source, rank=4, seed=5).result()
    training.forward_backward(SENTENCES, "cross_entropy").result()
    training.optim_step(FAST).result()
    path = training.save_weights_for_sampler("named").result().path
    sampling = client.create_sampling_client(model_path=path).result()
    tokens = SENTENCES[2].model_input.to_ints()
    [expected] = logps_of(training, [datum(tokens)])
    logps = sampling.compute_logprobs(types.ModelInput.from_ints(tokens)).result()
    assert logps[0] is None
    np.testing.assert_allclose(logps[1:], expected, atol=1e-4)
    greedy = types.SamplingParams(max_tokens=3, temperature=0.0, stop=[])
    found = sampling.sample(
        types.ModelInput.from_ints(tokens), 1, greedy, True, 2, 2, prompt_logprobs_last_n=4
    ).result()
    assert [logp is None for logp in found.prompt_logprobs] == [True] * (len(tokens) - 4) + [False] * 4
    np.testing.assert_allclose(found.prompt_logprobs[-4:], expected[-4:], atol=1e-4)
    assert [None if its is None else len(its) for its in found.topk_prompt_logprobs[-5:]] == [None, 2, 2, 2, 2]
    [sequence] = found.sequences
    assert sequence.stop_reason == "length"
    for token, logp, likeliest in zip(sequence.tokens, sequence.logprobs, sequence.topk_logprobs, strict=True):
        assert likeliest[0][0] == token
        np.testing.assert_allclose(likeliest[0][1], logp, atol=1e-5)
    base = client.create_sampling_client(base_model=server.source).result()
    assert (base.get_base_model(), sampling.get_base_model()) == (server.source, server.source)
    assert base.compute_logprobs(types.ModelInput.from_ints(tokens)).result()[1:] != logps[1:]


def test_a_stop_token_ends_a_sample_and_is_part_of_it(client, server):
    sampling = client.create_sampling_client(base_model=server.source).result()
    prompt = types.ModelInput.from_ints([5, 6, 7])
    greedy = types.SamplingParams(max_tokens=6, temperature=0.0, stop=[])
    [whole] = sampling.sample(prompt, 1, greedy).result().sequences
    stop = whole.tokens[3]
    [ended] = sampling.sample(prompt, 1, greedy.model_copy(update={"stop": [stop]})).result().sequences
    first = whole.tokens.index(stop) + 1
    assert (ended.tokens, ended.stop_reason) == (whole.tokens[:first], "stop")
    assert len(ended.logprobs) == first


def test_ends_of_a_sample_are_so_many(client, server):
    sampling = client.create_sampling_client(base_model=server.source).result()
    prompt = types.ModelInput.from_ints([5, 9])
    for stop in (list(range(33)), [f"x{number}" for number in range(33)]):
        with pytest.raises(tinker.BadRequestError, match="stop has 33 ends; use up to 32"):
            sampling.sample(prompt, 1, types.SamplingParams(max_tokens=2, stop=stop)).result()


def test_another_keys_models_and_checkpoints_are_not_there(client, server):
    training = client.create_lora_training_client(base_model=server.source, rank=4).result()
    state = training.save_state("mine").result().path
    weights = training.save_weights_for_sampler("mine").result().path
    sampling = training.save_weights_and_get_sampling_client().result()
    rest = rest_of(server, "bertha")
    for asked in (
        lambda: rest.get_training_run(training.model_id),
        lambda: rest.list_checkpoints(training.model_id),
        lambda: rest.get_weights_info_by_tinker_path(state),
        lambda: rest.delete_checkpoint_from_tinker_path(weights),
        lambda: rest.get_sampler(sampling._sampling_session_id),
        lambda: rest.get_session(training.model_id.split(":")[0]),
    ):
        with pytest.raises(tinker.NotFoundError):
            asked().result()
    assert rest.list_user_checkpoints().result().checkpoints == []
    assert rest.list_training_runs().result().training_runs == []
    with client_of(server, "bertha") as other:
        with pytest.raises(tinker.RequestFailedError, match="there is no checkpoint"):
            other.create_training_client_from_state(state).result()
        with pytest.raises(tinker.NotFoundError):
            other.create_sampling_client(model_path=weights).result()
        theirs = other.create_lora_training_client(base_model=server.source, rank=4).result()
        theirs.model_id = training.model_id
        with pytest.raises(tinker.NotFoundError, match="there is no model"):
            theirs.forward_backward(SENTENCES, "cross_entropy").result()


def test_what_cannot_be_done_is_said_and_training_goes_on(client, server):
    training = client.create_lora_training_client(base_model=server.source, rank=4).result()
    [one, *_] = SENTENCES
    bad = {
        "no loss_fn 'gspo'": ([one], "gspo", None),
        "loss_fn_config has 'beta'": ([one], "cross_entropy", {"beta": 1.0}),
        "dro needs loss_fn_config": ([one], "dro", None),
        r"data\[0\] has 'weights'": ([one], "ppo", None),
        "outside the model's 0 to 399": ([datum([5, 400])], "cross_entropy", None),
        "at most 512 are read": ([datum([1] * 600)], "cross_entropy", None),
        "7 values and model_input has 5": (
            [types.Datum(model_input=one.model_input, loss_fn_inputs={"target_tokens": [1] * 7})],
            "cross_entropy",
            None,
        ),
    }
    for message, given in bad.items():
        with pytest.raises(tinker.RequestFailedError, match=message) as error:
            training.forward_backward(*given).result()
        assert error.value.category is types.RequestErrorCategory.User
    with pytest.raises(tinker.RequestFailedError, match="a forward_backward before this step failed"):
        training.optim_step(FAST).result()
    with pytest.raises(tinker.RequestFailedError, match="call forward_backward before"):
        training.optim_step(FAST).result()
    with pytest.raises(tinker.RequestFailedError, match=r"adam_params\.beta1"):
        training.optim_step(types.AdamParams(beta1=1.5)).result()
    for name in ("../../etc", "a/b", ""):
        with pytest.raises(tinker.RequestFailedError, match="no name of a checkpoint"):
            training.save_weights_for_sampler(name or "/").result()
    training.forward_backward([one], "cross_entropy").result()
    assert training.optim_step(FAST).result().metrics["grad_norm"] > 0
    with pytest.raises(tinker.BadRequestError, match="no base model 'gpt'"):
        client.create_lora_training_client(base_model="gpt").result()
    with pytest.raises(tinker.BadRequestError, match="rank is 33, and may be 32"):
        client.create_lora_training_client(base_model=server.source, rank=33).result()
    for path in ("tinker://x/weights/../../..", "tinker://../weights/x", "tinker://a/b", "tinker://a/weights/%2e%2e"):
        with pytest.raises((tinker.BadRequestError, tinker.NotFoundError)):
            client.create_sampling_client(model_path=path).result()


def test_a_download_is_what_peft_reads(client, server, tmp_path):
    training = client.create_lora_training_client(base_model=server.source, rank=4, seed=6).result()
    training.forward_backward(SENTENCES, "cross_entropy").result()
    training.optim_step(FAST).result()
    training.save_weights_for_sampler("w").result()
    url = f"{server.url}/api/v1/training_runs/{training.model_id}/checkpoints/sampler_weights/w/archive"
    answer = httpx.get(url, headers={"X-API-Key": server.key("anna")})
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        tar.extractall(tmp_path, filter="data")
    programs: Programs = server.application.state.tinker.programs
    adapter, saved = open_adapter(tmp_path, programs.base.model.spec).read()
    assert not saved
    assert set(tree.flatten(adapter)) == set(tree.flatten(programs.abstract(Shape(4))))
    tokens = SENTENCES[2].model_input.to_ints()
    [expected] = logps_of(training, [datum(tokens)])
    found, _ = prompt_logps(programs, adapter, np.asarray(tokens, np.int32))
    np.testing.assert_allclose(found[1:], expected, atol=1e-5)


def test_a_session_that_ends_takes_its_models_along(server):
    with client_of(server) as client:
        training = client.create_lora_training_client(base_model=server.source, rank=4).result()
        session = training.model_id.split(":")[0]
        assert training.model_id in rest_of(server).get_session(session).result().training_run_ids
    service = server.application.state.tinker
    assert training.model_id not in service._models


def test_what_a_session_asked_for_before_it_ended_does_not_stay(server):
    service, owner = server.application.state.tinker, server.keys.owner(server.key("leaver"))
    session = service.open(owner, bodies.CreateSession())
    began, go_on = threading.Event(), threading.Event()
    service.work.submit("busy", owner, lambda: (began.set(), go_on.wait(30)))
    began.wait(10)
    lora = {"session_id": session, "model_seq_id": 0, "base_model": server.source, "lora_config": {"rank": 4}}
    asked = service.create(owner, bodies.CreateModel(**lora))
    service.finish(session, owner)
    go_on.set()
    with pytest.raises(Failed, match="has ended"):
        asked.future.result(60)
    assert not [id for id in service._models if id.startswith(session)]
    sampling = {"session_id": session, "sampling_session_seq_id": 0, "base_model": server.source}
    with pytest.raises(Refused, match="has ended") as refused:
        service.create_sampler(owner, bodies.CreateSamplingSession(**sampling))
    assert refused.value.status == 410
    assert service.samplers.of_session(session) == []


VALUES = (
    None,
    True,
    -1,
    2**70,
    1.5,
    "",
    "../..",
    "\ud800",
    "a\0b",
    "x" * 5000,
    [],
    {},
    {"type": "y"},
    [[1]],
    {"chunks": 1},
)
NAMES = (
    *("session_id", "model_seq_id", "base_model", "lora_config", "model_id", "seq_id", "adam_params", "path"),
    *("ttl_seconds", "request_id", "prompt", "sampling_params", "sampling_session_id", "optimizer", "nobody_knows"),
)


def broken_batch(draw: random.Random, model: str, number: int) -> bytes:
    """A batch in which one thing is wrong."""
    good = types.ForwardBackwardInput(data=[SENTENCES[0]], loss_fn="cross_entropy")
    message = forward_backward_request_to_proto(types.ForwardBackwardRequest(good, model, number))
    its = message.data[0]
    weights = its.loss_fn_inputs["weights"]

    def sparse():
        weights.sparse_csr.values = b"abcd"

    wrong = (
        lambda: message.ClearField("data"),
        lambda: setattr(message, "loss_fn", draw.choice(("", "gspo", "x" * 3000))),
        lambda: its.model_input.add().image.SetInParent(),
        lambda: setattr(its.model_input[0].encoded_text, "tokens", draw.randbytes(draw.choice((5, 20)))),
        lambda: its.ClearField("model_input"),
        lambda: setattr(weights, "dense", draw.randbytes(draw.choice((3, 8)))),
        lambda: setattr(weights, "dense", np.full(5, np.nan, np.float32).tobytes()),
        lambda: setattr(weights, "dtype", draw.choice((0, 3, 4, 77))),
        lambda: weights.shape.extend([2, 3]),
        sparse,
        lambda: its.loss_fn_inputs["target_tokens"].ClearField("dense"),
        lambda: its.loss_fn_inputs["mask"].CopyFrom(weights),
        lambda: setattr(message.loss_fn_config_v2["beta"], "text", "x"),
    )
    draw.choice(wrong)()
    return message.SerializeToString()


def test_malformed_requests_fail_with_a_message_and_never_in_the_server(client, server):
    draw, training = random.Random(5), client.create_lora_training_client(base_model=server.source, rank=4).result()
    asked = [(path, methods) for path, methods in routes_of(server.application, "/api/v1/") if "telemetry" not in path]
    assert len(asked) > 25
    answered = []
    with httpx.Client(headers={"X-API-Key": server.key("anna")}, base_url=server.url) as http:
        for _ in range(400):
            path, methods = draw.choice(asked)
            for name in ("run", "session", "sampler", "kind", "name"):
                path = path.replace(f"{{{name}}}", draw.choice(("x", "%2e%2e", "%00", "weights", "9" * 3000)))
            body = {draw.choice(NAMES): draw.choice(VALUES) for _ in range(draw.randint(0, 4))}
            content = json.dumps(draw.choice((body, body, [body], 1))).encode()
            kind = draw.choice(("application/json", "application/json", "application/x-protobuf", "text/plain"))
            content = draw.choice((content, content, draw.randbytes(200), content[: len(content) // 2]))
            answered.append(http.request(draw.choice(methods), path, content=content, headers={"Content-Type": kind}))
        for answer in answered:
            assert answer.status_code < 500, (answer.request, answer.text)
            assert answer.status_code == 200 or answer.json()["error"]["message"]
        assert sum(answer.status_code >= 400 for answer in answered) > 200
        for number in range(1, 81):
            raw = broken_batch(draw, training.model_id, number)
            answer = http.post(
                "/api/v1/forward_backward", content=raw, headers={"Content-Type": "application/x-protobuf"}
            )
            assert answer.status_code == 200, answer.text
            result = http.post("/api/v1/retrieve_future", json={"request_id": answer.json()["request_id"]}).json()
            assert result["category"] == "user", result
    training._request_id_counter = training._turn_counter = 80
    training.forward([SENTENCES[0]], "cross_entropy").result()  # which goes on

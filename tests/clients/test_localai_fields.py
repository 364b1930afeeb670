"""Every field of LocalAI's protocol is used, changes nothing, or is refused with its name."""

import importlib
import json

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor

from tests.checkpoints import checkpoint, sample_image
from tests.clients.localai import failure
from tests.hosts.inprocess import InProcessHost

PUBLISHED = {
    "ModelOptions": """
        Model=1 ContextSize=2 Seed=3 NBatch=4 F16Memory=5 MLock=6 MMap=7 VocabOnly=8 LowVRAM=9
        Embeddings=10 NUMA=11 NGPULayers=12 MainGPU=13 TensorSplit=14 Threads=15 RopeFreqBase=17
        RopeFreqScale=18 RMSNormEps=19 NGQA=20 ModelFile=21 PipelineType=26 SchedulerType=27
        CUDA=28 CFGScale=29 IMG2IMG=30 CLIPModel=31 CLIPSubfolder=32 CLIPSkip=33 ControlNet=48
        Tokenizer=34 LoraBase=35 LoraAdapter=36 LoraScale=42 NoMulMatQ=37 DraftModel=39
        AudioPath=38 Quantization=40 GPUMemoryUtilization=50 TrustRemoteCode=51 EnforceEager=52
        SwapSpace=53 MaxModelLen=54 TensorParallelSize=55 LoadFormat=58 DisableLogStatus=66
        DType=67 LimitImagePerPrompt=68 LimitVideoPerPrompt=69 LimitAudioPerPrompt=70 MMProj=41
        RopeScaling=43 YarnExtFactor=44 YarnAttnFactor=45 YarnBetaFast=46 YarnBetaSlow=47 Type=49
        FlashAttention=56 NoKVOffload=57 ModelPath=59 LoraAdapters=60 LoraScales=61 Options=62
        CacheTypeKey=63 CacheTypeValue=64 GrammarTriggers=65 Reranking=71 Overrides=72
        EngineArgs=73 Proxy=74 EnableScore=75""",
    "GenerateImageRequest": """
        height=1 width=2 step=4 seed=5 positive_prompt=6 negative_prompt=7 dst=8 src=9
        EnableParameters=10 CLIPSkip=11 ref_images=12 ModelIdentity=13""",
    "GenerateVideoRequest": """
        prompt=1 negative_prompt=2 start_image=3 end_image=4 width=5 height=6 num_frames=7 fps=8
        seed=9 cfg_scale=10 step=11 dst=12 audio=13 params=14 ModelIdentity=15""",
}
"""LocalAI's backend.proto of August 2026."""
VALUES = {
    FieldDescriptor.CPPTYPE_STRING: "x",
    FieldDescriptor.CPPTYPE_BOOL: True,
    FieldDescriptor.CPPTYPE_INT32: 3,
    FieldDescriptor.CPPTYPE_FLOAT: 0.5,
}
SENT_ALWAYS = {"ContextSize": 4096, "Seed": 12345, "NBatch": 512, "Threads": 4, "MMap": True,
               "NGPULayers": 99999999, "FlashAttention": "auto"}  # fmt: skip


def with_a_value(message, name):
    """The message with a value in this field that is not its default."""
    field = message.DESCRIPTOR.fields_by_name[name]
    if field.message_type is not None:
        part = getattr(message, name)
        (part.add() if hasattr(part, "add") else part).SetInParent()
    elif field.is_repeated:
        getattr(message, name).append(VALUES[field.cpp_type])
    else:
        setattr(message, name, VALUES[field.cpp_type])
    return message


@pytest.fixture(scope="module")
def rules(backend):
    return importlib.import_module("request_fields")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_field_has_one_rule(backend, rules, name):
    published = dict(each.split("=") for each in PUBLISHED[name].split())
    ours = getattr(backend.pb, name).DESCRIPTOR.fields
    assert {field.name: str(field.number) for field in ours} == published
    tables = [rules.USED[name], rules.HARMLESS[name], rules.REFUSED[name]]
    assert sorted(field for table in tables for field in table) == sorted(published)
    assert all(reason for table in tables[1:] for reason in table.values())


def test_refused_fields_of_a_model_are_named(localai, host, rules):
    for name, reason in rules.REFUSED["ModelOptions"].items():
        options = localai.pb.ModelOptions(Options=[f"url:{host.url('')}"])
        answer = localai.call("LoadModel", with_a_value(options, name))
        assert not answer.success, name
        assert answer.message.startswith(f"{name}=") and reason in answer.message


def test_fields_that_change_nothing_leave_the_arguments_as_they_are(backend, rules):
    read = importlib.import_module("model").read_options
    plain = read(backend.pb.ModelOptions(PipelineType="sdxl"))
    for name in rules.HARMLESS["ModelOptions"]:
        given = with_a_value(backend.pb.ModelOptions(PipelineType="sdxl"), name)
        assert read(given) == plain, name
    assert read(backend.pb.ModelOptions(PipelineType="sdxl", **SENT_ALWAYS)) == plain


@pytest.mark.parametrize(
    ("fields", "argument"),
    [
        ({"DType": "bfloat16", "F16Memory": True}, "--variant=bf16"),
        ({"DType": "float32"}, "--variant=fp32"),
        ({"TensorParallelSize": 2}, "--nproc_per_node=2"),
        ({"TensorParallelSize": 2, "Options": ["nproc_per_node:1"]}, "--nproc_per_node=1"),
        ({"LowVRAM": True}, "--enable_model_cpu_offload"),
        ({"LowVRAM": True, "Options": ["enable_group_offload"]}, "--enable_group_offload"),
    ],
)
def test_fields_of_launching_become_arguments(backend, fields, argument):
    read = importlib.import_module("model").read_options
    assert read(backend.pb.ModelOptions(**fields)).arguments == (argument,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"DType": "int3"}, "DType=int3 is not allowed. Allowed: float16, "),
        ({"LoraScale": 0.5}, "LoraScale is given without LoraAdapter"),
        ({"LoraScales": [1.0]}, "LoraScales has 1 values for 0 LoraAdapters"),
    ],
)
def test_values_that_mean_nothing_are_refused(localai, fields, message):
    answer = localai.load(**fields)
    assert not answer.success and message in answer.message


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"LowVRAM": True}, "LowVRAM"),
        ({"LoraAdapter": "x.safetensors"}, "LoraAdapter"),
        ({"LoraAdapters": ["x.safetensors"]}, "LoraAdapters"),
        ({"ControlNet": "x"}, "ControlNet"),
        ({"TensorParallelSize": 2}, "TensorParallelSize"),
        ({"Options": ["nproc-per-node:2"]}, "nproc_per_node"),
    ],
)
def test_host_that_runs_already_takes_no_arguments(localai, host, fields, named):
    options = [f"url:{host.url('')}", *fields.pop("Options", [])]
    answer = localai.load(Options=options, **fields)
    assert not answer.success and answer.message.startswith(f"{named} is for a host that this")


def test_scheduler_of_a_model_acts_on_a_host_that_runs(localai, host, tmp_path):
    assert localai.load(SchedulerType="heun", Options=[f"url:{host.url('')}"]).success
    request = localai.pb.GenerateImageRequest(
        positive_prompt="a", step=2, EnableParameters="steps", dst=str(tmp_path / "x.png")
    )
    assert localai.call("GenerateImage", request).success
    assert "Heun" in host.queue.jobs()[-1].result.resolved["scheduler"]


def test_request_for_another_model_is_not_answered(localai, host, tmp_path):
    """LocalAI looks for this code and these words, and then calls the right backend."""
    assert localai.load(Model="mine", Options=[f"url:{host.url('')}"]).success
    fields = {"positive_prompt": "a", "step": 1, "dst": str(tmp_path / "x.png")}
    for method, prompt in (("GenerateImage", fields), ("GenerateVideo", {"prompt": "a"})):
        code, details = failure(localai, method, ModelIdentity="other", **prompt)
        assert code is grpc.StatusCode.NOT_FOUND and "model identity mismatch" in details
    request = localai.pb.GenerateImageRequest(ModelIdentity="mine", **fields)
    assert localai.call("GenerateImage", request).success


def test_field_of_a_newer_protocol_is_logged(loaded, tmp_path, caplog):
    request = loaded.pb.GenerateImageRequest(
        positive_prompt="a", step=1, dst=str(tmp_path / "x.png")
    )
    request.MergeFromString(b"\xfa\x3e\x01x")  # number 1007, a text
    assert loaded.call("GenerateImage", request).success
    assert "does not know (numbers 1007)" in caplog.text


def test_params_of_a_video_are_fields_of_the_host(localai, tmp_path):
    with InProcessHost(type="svd", checkpoint=str(checkpoint("svd"))) as host:
        assert localai.load(Options=[f"url:{host.url('')}"]).success
        source = tmp_path / "start.png"
        sample_image(64).save(source)
        fields = {"start_image": str(source), "num_frames": 2, "step": 1, "fps": 9,
                  "dst": str(tmp_path / "x.mp4")}  # fmt: skip
        params = {"noise_aug_strength": "0", "scheduler": json.dumps("euler")}
        request = localai.pb.GenerateVideoRequest(params=params, **fields)
        assert localai.call("GenerateVideo", request).success
        made = host.queue.jobs()[-1].request
        assert (made.noise_aug_strength, made.scheduler, made.fps) == (0, "euler", 9)
        for more, said in (
            ({"params": {"num_frames": "3"}}, "num_frames is given twice"),
            ({"params": {"motion_bucket": "3"}}, "motion_bucket is not a field"),
            ({"params": {"motion_bucket_id": "much"}}, "motion_bucket_id='much'"),
            ({"audio": "x.wav"}, "audio=x.wav is not available"),
            ({"end_image": "x"}, "end_image=x is not available"),
            ({"fps": -3}, "fps=-3"),
        ):
            code, details = failure(localai, "GenerateVideo", **{**fields, **more})
            assert code is grpc.StatusCode.INVALID_ARGUMENT and said in details, details

"""Every size's graph: operators that TensorRT's parser takes, free B and S, and what torch says, in each precision."""

import numpy as np
import onnx
import pytest

from models.bundle import INPUT_NAMES, OUTPUT_NAMES, Arrays
from models.phantoms import LABELS, phantom
from models.preprocess import prepare
from models.spec import MODALITIES
from models.tasks import INPUTS, TASKS
from tests.models.conftest import one_series, session_of

pytest.importorskip("torch", reason="export needs the extra `train`")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# onnx/onnx-tensorrt, docs/operators.md of TensorRT 10.15: every operator marked Y that a network may need. TensorRT 11's
# ONNX opset guide names the same page and takes opsets 9 to 25.
OPSETS = range(9, 25)
_MARKED_Y = """
    Abs Add And ArgMax ArgMin Attention AveragePool BatchNormalization Cast CastLike Ceil Clip Concat Constant
    ConstantOfShape Conv ConvTranspose Cos CumSum DepthToSpace DequantizeLinear Div Einsum Elu Equal Erf Exp Expand Flatten
    Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GroupNormalization
    HardSigmoid HardSwish Identity InstanceNormalization LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax
    LpNormalization MatMul Max MaxPool Mean Min Mish Mod Mul Neg Not OneHot Or Pad Pow PRelu QuantizeLinear Range Reciprocal
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu
    Reshape Resize RMSNormalization Round ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Size Slice Softmax Softplus
    Split Sqrt Squeeze Sub Sum Tan Tanh Tile TopK Transpose Unsqueeze Where Xor
"""
TAKEN = frozenset(_MARKED_Y.split())
SIZES = ["hybrid-nano", "hybrid-tiny", "hybrid-small", "hybrid-base"]


class Exported:
    """One size with random weights, its graphs made once."""

    def __init__(self, size: str) -> None:
        from models.export import to_onnx
        from models.restore import new_network
        from models.variants import FORMS, to_fp16, to_int8

        self.network = new_network(size, TASKS, INPUTS, seed=0).eval()
        fp32 = to_onnx(self.network)
        calibration = [random_batch(1, 2, seed) for seed in range(2)]
        self.graphs = {"fp32": fp32, "fp16": to_fp16(fp32), "int8": to_int8(fp32, FORMS[1], calibration)}


@pytest.fixture(scope="module", params=SIZES)
def exported(request: pytest.FixtureRequest) -> Exported:
    return Exported(request.param)


def random_batch(batch: int, slices: int, seed: int) -> Arrays:
    generator = np.random.default_rng(seed)
    mask_BS = np.ones((batch, slices), bool)
    mask_BS[0, 1:] = False
    return {
        "slices_BSHW": generator.uniform(-1, 1, (batch, slices, 96, 96)).astype(np.float32),
        "slice_mask_BS": mask_BS,
        "modality_B": generator.integers(0, len(MODALITIES), batch),
    }


def phantom_batch(modality: str) -> Arrays:
    spec = next(spec for spec in INPUTS if spec.modality == modality)
    prepared = prepare(phantom(modality, LABELS[modality][1], 5).volume, spec)
    return one_series(prepared.slices_SHW.astype(np.float32), MODALITIES.index(modality))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_tensorrt_takes_every_operator(exported: Exported, precision: str) -> None:
    model = onnx.load_from_string(exported.graphs[precision])
    assert {node.op_type for node in model.graph.node} <= TAKEN
    assert {node.domain for node in model.graph.node} == {""}
    assert [(entry.domain, entry.version in OPSETS) for entry in model.opset_import] == [("", True)]
    assert not model.functions


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_page_s_restrictions_are_kept(exported: Exported, precision: str) -> None:
    model = onnx.load_from_string(exported.graphs[precision])
    constant = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type.startswith("Reduce"):
            assert set(node.input[1:]) <= constant, "axes are initializers"
        if node.op_type == "LayerNormalization":
            assert len(node.output) == 1
        if node.op_type == "Resize":
            assert attributes["mode"] == b"nearest"
            assert attributes["nearest_mode"] in (b"floor", b"ceil", b"round_prefer_floor", b"round_prefer_ceil")
            assert not attributes.get("antialias")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_batch_and_slices_are_free_and_the_ends_are_float32(exported: Exported, precision: str) -> None:
    graph = exported.graphs[precision]
    model = onnx.load_from_string(graph)
    for value in (*model.graph.input, *model.graph.output):
        kind = value.type.tensor_type
        free = [axis.dim_param for axis in kind.shape.dim[:2]]
        assert all(free[: 1 if value.name in ("modality_B", "ood_B") else 1 if value.name == "logits_BK" else 2])
        if value.name not in ("slice_mask_BS", "modality_B"):
            assert kind.elem_type == onnx.TensorProto.FLOAT
    run = session_of(graph)
    for batch, slices in ((1, 1), (3, 5)):
        outputs = run(random_batch(batch, slices, 7))
        assert outputs["map_BSKhw"].shape == (batch, slices, 9, 12, 12)
        assert all(np.isfinite(array).all() for array in outputs.values())


def test_onnx_runtime_says_what_torch_says(exported: Exported) -> None:
    from models.export import PARITY, parity

    drawn = [random_batch(batch, slices, seed) for seed, (batch, slices) in enumerate([(1, 1), (2, 4), (3, 12)])]
    assert parity(exported.network, exported.graphs["fp32"], drawn) <= PARITY
    assert parity(exported.network, exported.graphs["fp32"], [phantom_batch(m) for m in MODALITIES]) <= PARITY


def test_fp16_leaves_the_distribution_score_in_float32(exported: Exported) -> None:
    """It is a sum of squares: float16 ends at 65504."""
    model = onnx.load_from_string(exported.graphs["fp16"])
    kind = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert kind["ood_whiten_DD"] == onnx.TensorProto.FLOAT
    assert kind["head.weight"] == onnx.TensorProto.FLOAT16
    batch = random_batch(2, 3, 1)
    by_fp32, by_fp16 = (session_of(exported.graphs[p])(batch)["ood_B"] for p in ("fp32", "fp16"))
    np.testing.assert_allclose(by_fp16, by_fp32, rtol=1e-2)


def test_names_are_the_contract_s(exported: Exported) -> None:
    for graph in exported.graphs.values():
        model = onnx.load_from_string(graph)
        assert tuple(value.name for value in model.graph.input) == INPUT_NAMES
        assert tuple(value.name for value in model.graph.output) == OUTPUT_NAMES

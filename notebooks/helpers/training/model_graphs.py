"""What may be in a SavedModel, read without TensorFlow.

A graph is a program: TensorFlow's operations write files, read them and call Python, and a SavedModel may run some of
them while it is loaded.

Operations are let through by name. TensorFlow marks those that have side effects as stateful, but `ReadFile`,
`ImmutableConst` (which maps a file) and `PyFuncStateless` are not, and every version adds some: a list of the bad ones
would have to be complete, one of the good ones only has to suffice. What a graph computes is not bounded by any of
this: one that is allowed can still give wrong answers, and take all memory and time while it runs.
"""

import re
import sys
from pathlib import Path

from .model_weights import refuse
from .protobuf_fields import Malformed, fields, find, text

MAX_GRAPH_BYTES = 2**24  # the exported DenseNet-121 has 4.6 MB, most of it the saving and restoring of its variables
EXPORT_AGAIN = "Have it exported again by 05_export_and_predict.ipynb, or do not use it"
_MAX_NODES = 2**16  # the export has 15,000, with 29,000 inputs
_MAX_INPUTS = 2**17
_FILES = re.compile(r"saved_model\.pb|fingerprint\.pb|variables/variables\.(index|data-\d{5}-of-\d{5})")
_WRITING, _READING = {"SaveV2", "MergeV2Checkpoints", "ShardedFilename"}, {"RestoreV2"}

_OPS = {
    "arrays": "ArgMax ArgMin BatchToSpaceND Bincount Bitcast BroadcastArgs BroadcastGradientArgs BroadcastTo Bucketize "
    "Cast ConcatOffset ConcatV2 Const Cumprod Cumsum DenseBincount DepthToSpace DynamicPartition DynamicStitch Empty "
    "EnsureShape ExpandDims ExtractImagePatches Fill Gather GatherNd GatherV2 Identity IdentityN InvertPermutation "
    "LinSpace LowerBound MatrixBandPart MatrixDiagPartV3 MatrixDiagV3 MirrorPad NoOp OneHot OnesLike Pack Pad PadV2 "
    "Placeholder PlaceholderWithDefault PreventGradient Range Rank Reshape ReverseV2 Roll ScatterNd Select SelectV2 "
    "Shape ShapeN Size Slice SpaceToBatchND SpaceToDepth Split SplitV Squeeze StopGradient StridedSlice "
    "StridedSliceGrad TensorScatterAdd TensorScatterUpdate Tile TopKV2 Transpose Unique UniqueV2 Unpack UpperBound "
    "Where ZerosLike",
    "arithmetic": "Abs Acos Add AddN AddV2 All Any Asin Atan Atan2 BatchMatMul BatchMatMulV2 BatchMatMulV3 BitwiseAnd "
    "BitwiseOr BitwiseXor Ceil ClipByValue Cos Cosh Div DivNoNan Einsum Equal Erf Erfc Erfinv Exp Expm1 Floor "
    "FloorDiv FloorMod Greater GreaterEqual Inv Invert IsFinite IsInf IsNan L2Loss LeftShift Less LessEqual Lgamma "
    "Log Log1p LogicalAnd LogicalNot LogicalOr MatMul Max Maximum Mean Min Minimum Mod Mul MulNoNan Neg NotEqual Pow "
    "Prod RealDiv Reciprocal RightShift Rint Round Rsqrt RsqrtGrad SegmentMax SegmentMean SegmentSum Sigmoid "
    "SigmoidGrad Sign Sin Sinh Sqrt SqrtGrad Square SquaredDifference Sub Sum Tan Tanh TanhGrad TruncateDiv "
    "TruncateMod UnsortedSegmentMax UnsortedSegmentSum Xdivy Xlog1py Xlogy",
    "layers": "AvgPool AvgPoolGrad BiasAdd BiasAddGrad Conv2D Conv2DBackpropFilter Conv2DBackpropInput "
    "DepthwiseConv2dNative DepthwiseConv2dNativeBackpropFilter DepthwiseConv2dNativeBackpropInput Elu FusedBatchNorm "
    "FusedBatchNormGradV3 FusedBatchNormV2 FusedBatchNormV3 LeakyRelu LogSoftmax LRN MaxPool MaxPoolGrad MaxPoolV2 "
    "Relu Relu6 ReluGrad Selu Softmax Softplus Softsign",
    "images": "AdjustContrastv2 CropAndResize DecodeAndCropJpeg DecodeImage DecodeJpeg DecodePng EncodeJpeg EncodePng "
    "ExtractJpegShape HSVToRGB ImageProjectiveTransformV3 NonMaxSuppressionV3 NonMaxSuppressionV4 "
    "NonMaxSuppressionV5 ResizeArea ResizeBicubic ResizeBilinear ResizeBilinearGrad ResizeNearestNeighbor RGBToHSV "
    "ScaleAndTranslate",
    "text": "AsString DecodeBase64 DecodeRaw EncodeBase64 Fingerprint ReduceJoin RegexFullMatch RegexReplace "
    "StaticRegexFullMatch StaticRegexReplace StringFormat StringJoin StringLength StringLower StringSplitV2 "
    "StringStrip StringToHashBucketFast StringToNumber StringUpper Substr UnsortedSegmentJoin",
    "flow": "Assert Case EmptyTensorList If MapDefun PartitionedCall StatefulPartitionedCall StatelessCase StatelessIf "
    "StatelessWhile TensorListConcatV2 TensorListElementShape TensorListFromTensor TensorListGather "
    "TensorListGetItem TensorListLength TensorListPopBack TensorListPushBack TensorListReserve TensorListResize "
    "TensorListScatterV2 TensorListSetItem TensorListSplit TensorListStack While",
    "variables": "AssignAddVariableOp AssignSubVariableOp AssignVariableOp DestroyResourceOp DisableCopyOnRead "
    "ReadVariableOp ResourceGather VarHandleOp VariableShape VarIsInitializedOp",
    "tables in memory": "HashTableV2 InitializeTableV2 LookupTableExportV2 LookupTableFindV2 LookupTableImportV2 "
    "LookupTableSizeV2",
    "data in memory": "AnonymousIteratorV2 AnonymousIteratorV3 BatchDataset BatchDatasetV2 ConcatenateDataset "
    "DatasetCardinality DatasetToSingleElement DeleteIterator FilterDataset FlatMapDataset IgnoreErrorsDataset "
    "InterleaveDataset IteratorGetNext IteratorGetNextAsOptional IteratorV2 MakeIterator MapDataset ModelDataset "
    "OptionalFromValue OptionalGetValue OptionalHasValue OptionalNone OptionsDataset PaddedBatchDatasetV2 "
    "ParallelBatchDataset ParallelMapDataset ParallelMapDatasetV2 PrefetchDataset RangeDataset ReduceDataset "
    "RepeatDataset RewriteDataset SkipDataset TakeDataset TensorDataset TensorSliceDataset UnbatchDataset ZipDataset",
    "chance": "RandomStandardNormal RandomUniform StatelessRandomGetAlg StatelessRandomGetKeyCounter "
    "StatelessRandomNormalV2 StatelessRandomUniformIntV2 StatelessRandomUniformV2 StatelessTruncatedNormalV2 "
    "TruncatedNormal",
}
_ALLOWED = {name for names in _OPS.values() for name in names.split()}


def check_saved_model(path):
    """Checks the folder of a SavedModel of TensorFlow 2: its files, and every operation of its graph and functions.

    Saving and restoring its own variables is allowed where every SavedModel has it: in the two functions that its
    saver names, which nothing else may call.

    Raises:
        ModelFileError: a file does not belong there, an operation is not on the list, or it is damaged.
    """
    path = Path(path)
    for file in path.rglob("*"):
        name = file.relative_to(path).as_posix()
        if file.is_symlink() or not (_FILES.fullmatch(name) or (file.is_dir() and name in ("variables", "assets"))):
            refuse(path, f"{name[:100]} is a link, or no file of a SavedModel without assets", EXPORT_AGAIN)
    graph = path / "saved_model.pb"
    if not graph.is_file() or graph.stat().st_size > MAX_GRAPH_BYTES:
        refuse(path, f"saved_model.pb is missing or larger than {MAX_GRAPH_BYTES:,} bytes", EXPORT_AGAIN)
    try:
        _check_meta_graphs(path, list(find(memoryview(graph.read_bytes()), 2)))
    except (UnicodeDecodeError, Malformed) as error:
        refuse(path, f"saved_model.pb is damaged ({error})", "Fetch the folder again")


def _check_meta_graphs(path, metas):
    if len(metas) != 1 or not list(find(metas[0], 7)):
        refuse(path, "it is not one graph of TensorFlow 2", EXPORT_AGAIN)
    if list(find(metas[0], 6)) or list(find(metas[0], 7, 1, 5)):
        refuse(path, "it brings assets: files that are read when it is loaded", EXPORT_AGAIN)
    main, functions = _list_graphs(path, metas[0])
    saver = [text(next(find(metas[0], 3, field), b"")).split(":")[0] for field in (2, 3)]
    callers = {}  # of the functions that touch files: the one node that may call each
    for names, nodes in [([], main), *functions]:
        ops = {op for op, *_ in nodes}
        writing, reading = ops & _WRITING, ops & _READING
        unknown = ops - _ALLOWED - writing - reading
        if unknown or (writing and reading) or ((writing or reading) and len(names) != 1):
            shown = ", ".join(sorted(unknown or writing | reading)[:5])[:200]
            refuse(
                path,
                f"its graph uses {shown}, which may reach files, processes or the network",
                f"{EXPORT_AGAIN}; what is yours and harmless goes into the list in helpers/training/model_graphs.py",
            )
        if writing or reading:
            callers[names[0]] = saver[0] if writing else saver[1]
    exposed = _list_names(find(metas[0], 7, 2, 1))
    shown = _list_names(find(metas[0], 5, 2, 2, 2, 1))  # outputs of the signatures
    used = {name.lstrip("^").split(":")[0] for name in shown.union(*(inputs for _, _, inputs, _ in main))}
    if callers and (used & set(saver) or exposed & callers.keys()):
        refuse(path, "what saves or restores its variables can be called as if it were the model", EXPORT_AGAIN)
    for inside, nodes in [(False, main), *((True, nodes) for _, nodes in functions)]:
        for _, node, _, raw in nodes:
            raw = bytes(raw)
            if any(name.encode() in raw and (inside or node != caller) for name, caller in callers.items()):
                refuse(path, f"{node[:100]} calls what saves or restores the variables", EXPORT_AGAIN)


def _list_graphs(path, meta):
    """Returns the nodes of the graph, and a list of (names, nodes), one for each function; counts while it reads."""
    n_nodes = n_inputs = 0

    def list_nodes(nodes):
        nonlocal n_nodes, n_inputs
        listed = []
        for node in nodes:
            ops, names, inputs = [], [], []
            for number, value in fields(node):
                if 0 < number < 4:
                    (names, ops, inputs)[number - 1].append(text(value))
            if len(ops) != 1 or len(names) != 1:
                raise Malformed("an operation without a name, or with two")
            listed.append((sys.intern(ops[0]), names[0], inputs, node))
            n_nodes, n_inputs = n_nodes + 1, n_inputs + len(inputs)
            if n_nodes > _MAX_NODES or n_inputs > _MAX_INPUTS:
                limits = f"{_MAX_NODES:,} operations or {_MAX_INPUTS:,} inputs of them"
                refuse(path, f"its graph has more than {limits}", EXPORT_AGAIN)
        return listed

    main = list_nodes(find(meta, 2, 1))
    functions = find(meta, 2, 2, 1)
    return main, [(sorted(_list_names(find(function, 1, 1))), list_nodes(find(function, 3))) for function in functions]


def _list_names(values):
    """Returns the different texts of fields."""
    names = set()
    for value in values:
        names.add(text(value))
        if len(names) > _MAX_INPUTS:
            raise Malformed(f"more than {_MAX_INPUTS:,} names")
    return names

"""Rows: whole parts of DeepSpeed that Partita has not."""

from partita.compat.deepspeed._surface.row import Row, absent, differs, works

_AUTOCAST = "set `torch_autocast` in the config"
_LONG = "there is no sequence parallelism; `partita.nn.functional` has a loss in chunks, and activations are recomputed"

_EXPERTS = (
    "there is no expert parallelism; experts are layers as others, and `set_z3_leaf_modules()` gathers them together"
)

ROWS: list[Row] = [
    *works(
        "moe.utils.",
        {
            "has_moe_layers is_moe_param is_moe_param_group": "no, as no layer is one of experts",
            "split_params_into_different_moe_groups_for_optimizer": "the groups as they are",
        },
    ),
    *works("compression.helper.", {"recursive_getattr recursive_setattr": "attributes by dotted names"}),
    *absent(
        "compression.",
        {
            "compress constants scheduler utils basic_layer helper.module_replacement "
            "helper.convert_conv1d_to_linear": "there is no compression; quantize or prune the saved model",
        },
    ),
    *differs("moe.", {"layer.MoE": f"can be imported and not made: {_EXPERTS}"}),
    *absent("moe.", {"experts sharded_moe mappings ep_router utils.configure_moe_param_groups": _EXPERTS}),
    *absent(
        "",
        {
            "inference": "Partita trains; save with `engine.save_model()` and serve the files with another library",
            "autotuning": "`memory_breakdown` and `flops_profiler` in the config say where memory and time go",
            "sequence": _LONG,
            "compile": "call `model.compile()`, in stages 0 to 2",
            "linear": "use PEFT's LoRA",
            "nvme io": "nothing is offloaded to disks",
            "datastates": "set `checkpoint.async_save`",
            "elasticity": "any number of ranks goes on from a checkpoint",
            "model_implementations": "layers stay as the model has them",
        },
    ),
    *differs(
        "launcher.",
        {"runner.DEEPSPEED_ENVIRONMENT_NAME": "for `accelerate launch` on one host; use torchrun on each of several"},
    ),
    *absent(
        "launcher.",
        {
            "runner.main runner.parse_args launch multinode_runner": "start programs with torchrun, and `partita run` "
            "for those that import deepspeed"
        },
    ),
    *absent(
        "runtime.",
        {
            "torch_autocast.init_autocast_params torch_autocast.is_autocast_initialized "
            "torch_autocast.get_default_autocast_lower_precision_modules torch_autocast.has_autocast_dtype": _AUTOCAST,
            "sequence_parallel": _LONG,
            "data_pipeline": "there is no curriculum and no token dropping; select samples in the data set",
            "progressive_layer_drop": "drop layers in the model's forward",
            "eigenvalue": "there is no schedule of precisions by eigenvalues",
            "quantize weight_quantizer": "there is no quantized training",
            "swap_tensor": "nothing is offloaded to disks",
            "hybrid_engine": "`engine.module.generate()` works in every stage",
            "tensor_parallel domino": "there is no tensor parallelism",
            "superoffload zenflow": "set `offload_optimizer`",
            "checkpoint_engine": "set `checkpoint.async_save`",
            "sparse_tensor": "sparse gradients are refused by name; use dense embeddings",
            "compiler": "call `model.compile()`, in stages 0 to 2",
            "chunked_cross_entropy": "`partita.nn.functional.linear_cross_entropy`",
        },
    ),
]

"""Rows: partitioned parameters."""

from partita.compat.deepspeed._surface.row import Row, absent, works

_FULL = "on this rank there are parts of a buffer, not of a parameter: use `safe_{}_full_{}`"
_TILED = "split the layer in the model, or let stage 3 gather it whole; `partita.nn.functional` has a loss in chunks"
_ESTIMATE = "set `memory_breakdown` in the config, which prints what there is"

ROWS: list[Row] = [
    *works(
        "zero.",
        {
            "Init": "`partita.zero.Init`",
            "GatheredParameters": "`partita.zero.GatheredParameters`",
            "ZeroParamStatus ZeroParamType": "enumerations that others import",
            "register_external_parameter unregister_external_parameter": "accepted; a parameter is brought whenever "
            "the model computes with it",
        },
    ),
    *absent(
        "zero.",
        {
            "TiledLinear TiledLinearReturnBias": _TILED,
            "unwrap_model_for_generation": "`engine.module.generate()` works as it is",
            "Init.get_dp_process_group Init.get_partition_rank": "parameters are partitioned over all ranks of the job",
            "DeepSpeedZeRoOffload": "whether a parameter is there is seen by its shape",
        },
    ),
    *works(
        "utils.",
        {
            "safe_get_full_fp32_param safe_get_full_grad safe_get_full_optimizer_state": "in every stage; collectives",
            "safe_set_full_fp32_param safe_set_full_grad safe_set_full_optimizer_state": "in every stage; collectives",
            "safe_update_full_grad_vectorized": "one parameter after the other",
            "set_z3_leaf_module set_z3_leaf_modules set_z3_leaf_modules_by_name set_z3_leaf_modules_by_suffix "
            "unset_z3_leaf_modules get_z3_leaf_modules z3_leaf_module z3_leaf_parameter": "before `initialize()`; "
            "never needed for a right result",
        },
    ),
    *absent(
        "utils.",
        {
            **{
                f"safe_{verb}_local_{what}": _FULL.format(verb, what)
                for verb in ("get", "set")
                for what in ("fp32_param", "grad", "optimizer_state")
            },
            "get_full_hp_param get_full_hp_grad set_full_hp_param set_full_hp_grad get_hp_fragment_mapping "
            "tensor_fragment fragment_address map_to_flat_opt_states link_hp_params "
            "lazy_init_hp_params_optimizer_state": "use the `safe_get_full_` and `safe_set_full_` functions",
        },
    ),
    *works("runtime.zero.utils.", {"is_zero_param": "whether an engine of stage 3 has partitioned it"}),
    *absent(
        "runtime.zero.",
        {
            "stage_1_and_2.estimate_zero2_model_states_mem_needs_all_live "
            "stage_1_and_2.estimate_zero2_model_states_mem_needs_all_cold "
            "stage3.estimate_zero3_model_states_mem_needs_all_live "
            "stage3.estimate_zero3_model_states_mem_needs_all_cold": _ESTIMATE,
            "config.DeepSpeedZeroConfig config.DeepSpeedZeroOffloadParamConfig "
            "config.DeepSpeedZeroOffloadOptimizerConfig": "give the config as a dict; docs/config.md lists it",
            "offload_states": "states are offloaded by the config's `offload_optimizer`, from the beginning",
            "offload_config.OffloadStateTypeEnum offload_config.OffloadDeviceEnum": "states are offloaded by the "
            "config's `offload_optimizer`, from the beginning",
            "tiling": _TILED,
        },
    ),
]

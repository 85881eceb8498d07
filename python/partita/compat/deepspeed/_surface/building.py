"""Rows: what a program begins with, and what an engine is made of."""

from partita.compat.deepspeed._surface.row import Row, absent, differs, works

SETUP: list[Row] = [
    *works(
        "",
        {
            "initialize": "`partita.initialize`; the config is `config`, `config_params` or `args.deepspeed_config`",
            "init_distributed": "`partita.init_distributed`",
            "add_config_arguments": "`partita.add_config_arguments`",
            "DeepSpeedEngine": "holds a `partita.Engine`; made by `initialize()` or called itself",
            "DeepSpeed": "the same class",
            "PipelineEngine": "holds a `partita.PipelineEngine`",
            "DeepSpeedConfigError": "`partita.ConfigError`",
            "PipelineModule": "see [Pipelines](#pipelines)",
            "checkpointing": "see [Activation checkpointing](#activation-checkpointing)",
            "zero": "see [ZeRO](#zero)",
            "comm": "see [Communication and devices](#communication-and-devices)",
            "ops": "see [Optimizers and schedules](#optimizers-and-schedules)",
            "pipe": "see [Pipelines](#pipelines)",
            "utils": "see [Tools](#tools)",
            "logger log_dist": "of `deepspeed.utils`",
            "OnDevice": "of `deepspeed.utils`",
            "get_accelerator": "of `deepspeed.accelerator`",
            "__version__": "the version of DeepSpeed whose documentation this page follows",
        },
    ),
    *differs(
        "",
        {
            "DeepSpeedConfig": "checks a config as `partita.config.load_config` does, with its errors",
        },
    ),
    *works("runtime.config.", {"DeepSpeedConfig DeepSpeedConfigError": "as at the top"}),
    *absent(
        "",
        {
            "DeepSpeedHybridEngine": "there is one engine; `model.generate()` runs in it, in every stage",
            "DualPipeVEngine DualPipeVModule": 'set `pipeline.schedule` to "dualpipev" in the config',
            "InferenceEngine init_inference default_inference_config DeepSpeedInferenceConfig": "Partita trains; save "
            "with `engine.save_model()` and serve the files with an inference library",
            "tp_model_init set_autotp_mode": "there is no tensor parallelism; ZeRO stage 3 partitions the parameters",
            "DeepSpeedTransformerLayer DeepSpeedTransformerConfig": "use a layer of torch or transformers, with "
            "`torch.nn.functional.scaled_dot_product_attention`",
            "replace_transformer_layer revert_transformer_layer module_inject": "layers stay as the model has them",
            "DeepSpeedOptimizerCallable DeepSpeedSchedulerCallable": "any callable does",
            "DeepSpeedOptimizer ZeROOptimizer": "the engine's optimizer is `partita.optim.ShardedOptimizer`",
            "DeepSpeedDataLoader": "give `initialize(training_data=...)` a data set or a DataLoader",
            "add_core_arguments": "call `add_config_arguments()`",
            "set_optimizer_flags": "Muon is not here; give `initialize()` the optimizer",
            "pt": "a path of old versions; the names are at the top and in `deepspeed.runtime`",
        },
    ),
]

_ADAM = "`partita.FusedAdam`, the native update on CPUs and GPUs; `amsgrad=True` is refused"
_ONE_BIT = "gradients are not compressed to one bit: use Adam, and `communication_data_type` for 16-bit sums"

OPTIMIZERS: list[Row] = [
    *works(
        "ops.adam.",
        {
            "FusedAdam": _ADAM,
            "DeepSpeedCPUAdam": f"{_ADAM}; it runs where its parameters are, or on the CPU with `offload_optimizer`",
        },
    ),
    *works("ops.adagrad.", {"DeepSpeedCPUAdagrad": "`torch.optim.Adagrad`, over shards"}),
    *differs(
        "ops.",
        {
            "lion.DeepSpeedCPULion lion.FusedLion": "can be imported, and not made: give `initialize()` a Lion of "
            "another library, which runs over shards",
            "lamb.FusedLamb": "can be imported, and not made: LAMB needs the norms of whole layers; use AdamW with "
            "gradient clipping",
        },
    ),
    *absent(
        "ops.",
        {
            "adam.ZenFlowCPUAdam adam.ZenFlowSelectiveAdamW adam.ZenFlowSelectiveAdamW_stage3": "ZenFlow is not here: "
            "set `offload_optimizer.ratio` to update a part on the GPU",
            "transformer": "use layers of torch",
            "sparse_attention": "use `torch.nn.attention.flex_attention`, which takes any mask",
            "deepspeed4science": "use `torch.nn.functional.scaled_dot_product_attention` with a bias",
            "op_builder": "the native parts are in the wheel; nothing is compiled when a program runs",
            "aio gds": "nothing is offloaded to disks; `offload_optimizer` and `offload_param` use host memory",
            "fp_quantizer quantizer random_ltd": "there is no quantized training and no token dropping",
        },
    ),
    *absent(
        "runtime.",
        {
            "fp16.onebit.adam.OnebitAdam fp16.onebit.zoadam.ZeroOneAdam fp16.onebit.lamb.OnebitLamb": _ONE_BIT,
            "fp16.loss_scaler": "`engine.loss_scale`; its rules are the config's `fp16` section",
            "fp16.fused_optimizer fp16.unfused_optimizer bf16_optimizer": "the engine's optimizer is one class in "
            "every precision: `partita.optim.ShardedOptimizer`",
        },
    ),
    *works(
        "runtime.lr_schedules.",
        {
            "LRRangeTest OneCycle WarmupLR WarmupDecayLR WarmupCosineLR": "of the same parameters and values; a torch "
            "scheduler, usable without an engine",
            "VALID_LR_SCHEDULES": "their names",
            "OneCycle.get_mom WarmupCosineLR.get_lr_ratio": "as there",
        },
    ),
    *works(
        "runtime.lr_schedules.",
        {
            f"{schedule}.{call}": "as in torch"
            for schedule in ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
            for call in ("step", "get_lr", "get_last_lr", "state_dict", "load_state_dict")
        },
    ),
    *absent(
        "runtime.lr_schedules.",
        {
            "add_tuning_arguments parse_arguments get_config_from_args get_lr_from_config": "write `scheduler` into "
            "the config, or make the schedule and give it to `initialize(lr_scheduler=...)`",
            "override_params override_1cycle_params override_lr_range_test_params override_warmupLR_params "
            "override_warmupCosineLR_params": "write the parameters into the config's `scheduler.params`",
            "get_torch_optimizer update_lr": "write to `optimizer.param_groups`",
        },
    ),
]

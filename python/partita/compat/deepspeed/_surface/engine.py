"""Rows: the engine's calls and attributes."""

from partita.compat.deepspeed._surface.row import Row, absent, differs, works

_REDUCES = "the engine reduces gradients itself, during backward and in `step()`"
_COMPILE = "call `engine.compile()` or `model.compile()`, in stages 0 to 2"
_MOE = "there is no expert parallelism; experts are layers as others"
_DATA = "select samples in the data set or its sampler"

ROWS: list[Row] = [
    *works(
        "DeepSpeedEngine.",
        {
            "forward": "`engine(batch)`",
            "backward": "`retain_graph` and `scale_wrt_gas` too",
            "scale": "for a `loss.backward()` of one's own",
            "zero_grad": "drops the gradients since the last `step()`",
            "train eval": "as of any module",
            "no_sync": "stages 0 and 1",
            "coalesce_grad_reduction": "a block; several backwards before a step all count without it, too",
            "is_gradient_accumulation_boundary": "whether the next `step()` updates",
            "set_gradient_accumulation_boundary": "decides by hand",
            "was_step_applied": "false between boundaries and after a skipped step",
            "get_lr": "of each param group",
            "get_mom": "momentum or betas of each param group",
            "get_type": "the optimizer's `type` by param group, None where there is none",
            "get_global_grad_norm": "before clipping",
            "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps": "numbers of samples, and of "
            "micro-batches",
            "save_16bit_model save_fp16_model": "a file of torch's, as there; `save_model()` writes safetensors",
            "module_state_dict load_module_state_dict": "whole, on all ranks, in every stage",
            "destroy": "ends the engine",
            "device": "of the parameters",
            "module": "the model",
            "optimizer": "None where there is none; its `step()`, and that of the user's optimizer, is the engine's",
            "lr_scheduler": "None where there is none",
            "training_dataloader": "the loader of `training_data`",
            "global_steps global_samples micro_steps skipped_steps": "counts since the beginning",
            "global_rank local_rank world_size": "of this process",
            "get_data_parallel_rank": "the rank",
            "get_model_parallel_rank get_tensor_parallel_rank": "0",
            "mp_world_size": "1",
            "dp_world_size": "the world size",
            "compile": "`model.compile()`, in stages 0 to 2",
            "is_compiled": "whether `compile()` was called",
            "train_batch": "also of an engine that is no pipeline: one whole step",
            "monitor": "`write_events()` goes to the sinks of the config",
            "empty_partition_cache": "nothing stays gathered after a backward, so there is nothing to free",
        },
    ),
    *differs(
        "DeepSpeedEngine.",
        {
            "step": "updates at a boundary of the accumulation, as there; `lr_kwargs` is refused",
            "save_checkpoint": "the files are Partita's, see [the format](checkpoint-format.md), and always of the "
            "whole model; no zero_to_fp32.py is put beside: `partita checkpoint export`",
            "load_checkpoint": "Partita's checkpoints; `partita checkpoint import` makes one of DeepSpeed's. "
            "`custom_load_fn` is refused",
            "get_batch_info": "three numbers; in DeepSpeed they are three methods",
        },
    ),
    *absent(
        "DeepSpeedEngine.",
        {
            "set_train_batch_size set_train_micro_batch_size": "batch sizes are fixed: call "
            "`set_gradient_accumulation_boundary()` for steps of other numbers of micro-batches",
            "offload_states reload_states": 'set `offload_optimizer.device` to "cpu", or save and destroy the engine',
            "set_data_post_process_func": "give `initialize(collate_fn=...)`",
            "set_custom_curriculum_learning_schedule": _DATA,
            "deepspeed_io": "give `initialize(training_data=...)`",
            "allreduce_gradients allreduce_bucket allreduce_and_copy allreduce_no_retain buffered_allreduce_fallback "
            "sparse_allreduce sparse_allreduce_bucket sparse_allreduce_no_retain sparse_all_gather all_gather_scalar": (
                _REDUCES
            ),
            "clip_fp32_gradients": "set `gradient_clipping` in the config",
            "load_moe_state_dict": _MOE,
            "collect_python_gc": "call `gc.collect()`",
            "get_sequence_parallel_group": "there is no sequence parallelism",
            "is_iterable_style_dataset is_map_style_dataset": "any data set may be given to `initialize()`",
            "random_ltd_initialize": "there is no token dropping",
            "get_deepcompile_backend get_deepspeed_compile_backend get_autosp_backend get_autotp_backend "
            "get_compile_time register_compile_pass is_deepcompile_enabled is_deepcompile_active": _COMPILE,
            "get_wall_clock_timers": "set `wall_clock_breakdown`; the times are in the log and in the sinks",
            "print_forward_breakdown": "set `flops_profiler`",
            "get_optimizer_configuration": "`engine.optimizer.param_groups`",
        },
    ),
]

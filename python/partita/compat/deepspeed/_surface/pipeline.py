"""Rows: pipelines."""

from partita.compat.deepspeed._surface.row import Row, absent, differs, works

_SCHEDULE = "schedules are data here: `partita.pipeline.by_name()`, `draw()`, `prove()` and `simulate()`"
_GRID = "`engine.schedule` says which rank has which stage"

ROWS: list[Row] = [
    *works(
        "pipe.",
        {
            "PipelineModule": "`partita.pipeline.PipelineModule`, with `topology` too",
            "LayerSpec LayerSpec.build TiedLayerSpec TiedLayerSpec.build": "of `partita.pipeline`",
        },
    ),
    *differs("pipe.", {"PipelineModule.forward": "where all stages are on this rank; else refused"}),
    *works(
        "pipe.PipelineModule.",
        {
            "num_pipeline_stages topology set_checkpoint_interval": "as there",
        },
    ),
    *absent(
        "pipe.PipelineModule.",
        {
            "allreduce_tied_weight_gradients get_tied_weights_and_groups": "the engine sums gradients of tied layers",
            "partitions stage_owner": _GRID,
            "mpu": "there is no tensor parallelism",
            "ckpt_prefix ckpt_layer_path ckpt_layer_path_list save_state_dict load_state_dir": "checkpoints have the "
            "whole model by its names: `engine.save_checkpoint()`, `engine.save_model()`",
            "get_additional_losses": "add them in `loss_fn`",
        },
    ),
    *absent("pipe.", {"DualPipeVModule": 'set `pipeline.schedule` to "dualpipev" in the config'}),
    *works(
        "runtime.pipe.",
        {
            "ProcessTopology PipeDataParallelTopology PipeModelDataParallelTopology": "pure; a grid with named axes",
            "PipelineModule LayerSpec TiedLayerSpec": "of `deepspeed.pipe`",
            **{
                f"ProcessTopology.{call}": "as there"
                for call in (
                    "get_rank",
                    "get_axis_names",
                    "get_rank_repr",
                    "get_dim",
                    "get_coord",
                    "get_axis_comm_lists",
                    "filter_match",
                    "get_axis_list",
                    "world_size",
                )
            },
            "topology.ProcessTopology topology.PipeDataParallelTopology topology.PipeModelDataParallelTopology": "the "
            "same",
            "module.PipelineModule module.LayerSpec module.TiedLayerSpec": "the same",
        },
    ),
    *absent(
        "runtime.pipe.",
        {
            "topology.PipelineParallelGrid": _GRID,
            "schedule": _SCHEDULE,
            "p2p": "the engine sends between stages",
            "dualpipev": 'set `pipeline.schedule` to "dualpipev" in the config',
        },
    ),
    *works("runtime.pipe.engine.", {"PipelineEngine": "as at the top"}),
    *works(
        "PipelineEngine.",
        {
            "train_batch": "one step; `data_iter` is an iterator or a DataLoader of pairs",
            "is_first_stage is_last_stage": "as there",
            "get_pipeline_parallel_rank": "the stage of this rank",
            "set_dataiterator set_dataloader": "what `train_batch()` reads without an argument",
            "is_gradient_accumulation_boundary": "True: a call is a whole step",
            "module_state_dict load_module_state_dict": "of this rank's layers; loads from a whole model",
            "reset_activation_shape": "shapes may change at any time",
        },
    ),
    *differs(
        "PipelineEngine.",
        {
            "eval_batch": "the mean loss, on all ranks; `return_logits=True` and `compute_loss=False` are refused",
            "forward backward step": "refused, as there",
        },
    ),
    *absent(
        "PipelineEngine.",
        {
            "set_train_batch_size": "the schedule is made for one number of micro-batches; make another engine",
            "set_has_attention_mask": "stages pass tuples of tensors of any kind",
            "set_batch_fn": "make the pairs (inputs, labels) in the data set or `collate_fn`",
            "log_for_device tput_log": "set `steps_per_print`",
            "get_additional_losses": "add them in `loss_fn`",
        },
    ),
]

"""Every option of a run has a test that sets it and whose assertions depend on what was set."""

import ast
import functools
import re
from pathlib import Path

import pytest

from gptjax.config.clean import RULE_SET_OF
from gptjax.config.reader import flag_types
from gptjax.config.run import Config
from tests.test_step import FLIPS

TESTS = Path(__file__).parent
FLIPPED = {
    f"{section}.{field}" if isinstance(value, dict) else section
    for change in FLIPS
    for section, value in change.items()
    for field in (value if isinstance(value, dict) else [""])
}
# Options that act outside the step, by the test that changes them.
ELSEWHERE = {
    "test_trainer::test_logging_evaluation_and_sample_follow_their_options": (
        *("run_dir", "train.log_every", "train.eval_windows", "train.sample_prompt"),
    ),
    "test_trainer::test_init_from_starts_with_the_other_runs_weights": ("init_from",),
    "test_properties_runs::test_what_is_measured_and_computed_at_once_is_what_the_config_says": (
        *("cache_dir", "train.batch_size", "train.micro_batch_size", "train.sample_tokens"),
    ),
    "test_properties_runs::test_every_new_best_is_saved_and_each_manifest_has_the_loss_of_its_own_step": (
        *("train.eval_every", "train.save_every"),
    ),
    "test_properties_runs::test_best_loss_and_patience_survive_a_resume": ("train.patience", "train.keep_checkpoints"),
    "faults/test_numbers::test_a_spike_makes_no_update_and_names_its_documents": ("train.spike_sigma",),
    "faults/test_numbers::test_after_the_limit_nothing_is_accepted_until_the_host_looks": (
        "train.max_skipped_in_a_row",
    ),
    "faults/test_damage::test_training_goes_on_from_the_newest_good_checkpoint": ("train.strict_checkpoints",),
    "faults/test_process::test_other_data_is_allowed_when_asked_for": ("train.allow_data_change",),
    "test_finetune::test_the_best_checkpoint_is_chosen_by_the_score_that_is_asked_for": ("train.best_by",),
    "test_train_longer::test_a_longer_run_goes_from_the_rate_that_it_had_unless_asked_otherwise": (
        *("optim.extend", "optim.extended"),
    ),
    "test_properties_data::test_bits_per_byte_times_bytes_is_the_summed_loss": (
        *("data.path", "data.validation_fraction"),
    ),
    "test_properties_data::test_documents_see_each_other_where_the_config_says_so": ("data.attend_across_documents",),
    "test_rows::test_rows_are_held_out_by_their_text": ("data.max_documents",),
    "test_shards::test_id_outside_the_vocabulary_is_found_behind_right_checksums": ("data.verify",),
    "test_sources::test_standard_library_is_a_few_megabytes_in_the_same_order_every_time": ("data.source",),
    "test_sources::test_dataset_from_a_local_folder_gives_its_split": (
        *("data.hf_dataset", "data.streaming", "data.text_field"),
    ),
    "test_sources::test_invalid_utf8_is_replaced_or_left_out_and_counted": ("data.invalid_utf8",),
    "test_clean::test_unix_newlines_and_nfc_do_what_they_say": ("data.unicode", "data.newlines"),
    "test_clean::test_each_rule_counts_what_it_leaves_out": ("data.min_characters", "data.drop_duplicates"),
    "test_mixture::test_the_skip_list_names_documents_by_hash_line_or_file": ("data.skip",),
    "test_mixture::test_a_template_puts_fields_together": ("data.template",),
    "test_cleaning::test_runs_of_characters_that_came_before_are_removed": ("data.clean.duplicate_substrings",),
    "test_vocabulary::test_a_tokenizer_learns_from_the_share_of_documents_that_is_asked_for": (
        "tokenizer.sample_fraction",
    ),
    "test_batches::test_a_run_packs_as_its_config_says_and_tells_what_that_costs": ("data.packing",),
    "test_cleaning::test_a_killed_worker_of_a_cluster_loses_nothing_and_does_nothing_twice": ("data.clean.dask",),
    "test_collect::test_a_repository_gives_the_text_of_its_last_commit": ("data.git_endings",),
    "test_collect::test_unreadable_files_stop_or_are_counted_and_named": ("data.unreadable_files",),
    "test_cleaning::test_the_datasheet_adds_up_and_escapes_what_documents_hold": ("data.license",),
    "test_mixture::test_shares_follow_weights_epochs_or_temperature": ("mixture_temperature",),
    "test_cleaning::test_html_becomes_text_and_other_text_stays": ("data.clean.html",),
    "test_cleaning::test_mojibake_is_repaired": ("data.clean.repair",),
    "test_cleaning::test_languages_are_kept_or_left_out": ("data.clean.languages", "data.clean.language_confidence"),
    "test_cleaning::test_c4_removes_lines_that_are_no_sentences": ("data.clean.quality.rules",),
    "test_cleaning::test_each_limit_leaves_out_what_breaks_it": tuple(
        f"data.clean.quality.{limit}" for limit in RULE_SET_OF
    ),
    "test_cleaning::test_a_filter_of_the_user_changes_or_leaves_out": ("data.clean.filter",),
    "test_cleaning::test_only_the_kinds_that_are_asked_for_are_replaced": ("data.clean.personal_data",),
    "test_cleaning::test_documents_that_share_a_run_of_words_with_evaluation_data_are_left_out": (
        *("data.clean.decontaminate", "data.clean.decontaminate_ngram"),
    ),
    "test_cleaning::test_near_duplicates_are_those_of_brute_force": ("data.clean.near_duplicates",),
    "test_cleaning::test_repeated_lines_and_paragraphs_are_removed_and_counted": ("data.clean.duplicate_parts",),
    "test_cleaning::test_any_number_of_workers_and_shares_gives_the_same_tokens": ("data.clean.workers",),
    "test_tokenizer::test_trained_merges_encode_as_the_library_that_learned_them": (
        *("tokenizer.kind", "tokenizer.vocab_size"),
    ),
    "test_tokenizer::test_vocabulary_that_cannot_be_loaded_says_how_to_provide_it": ("tokenizer.name",),
    "test_model::test_remat_recomputes": ("train.remat",),
    "test_model::test_remat_and_unroll_change_no_gradient": ("train.unroll",),
    "test_architectures::test_logits_are_those_of_numpy": (
        *("model.head_dim", "model.mlp_width", "model.norm", "model.norm_epsilon", "model.norm_scale"),
        *("model.norm_position", "model.parallel", "model.qk_norm", "model.activation", "model.gated"),
        *("model.qkv_bias", "model.output_bias", "model.positions", "model.rope_base", "model.rope_local_base"),
        *("model.rope_fraction", "model.rope_scaling", "model.rope_factor", "model.attention_pattern"),
        *("model.attention_scale", "model.attention_softcap", "model.logit_softcap", "model.embedding_scale"),
        *("model.residual_scale", "model.logit_scale", "model.embedding_norm", "model.residual_mix"),
        *("model.attention_stride", "model.attention_summary", "model.attention_sinks", "model.relative_distance"),
        *("model.relative_values", "model.value_residual", "model.learned_skips"),
        *("model.n_expert", "model.experts_per_token", "model.n_shared_expert", "model.expert_width"),
    ),
    "test_experts::test_an_expert_that_is_full_drops_later_tokens_and_counts_them": ("model.expert_capacity",),
    "test_experts::test_experts_on_several_devices_learn_the_same": ("mesh.expert",),
    "test_experts::test_the_weights_of_the_routers_losses_change_what_is_learned": (
        *("model.balance_loss", "model.router_z_loss"),
    ),
    "test_architectures::test_llama3_scaling_reads_its_two_factors": (
        *("model.rope_low_frequency_factor", "model.rope_high_frequency_factor"),
    ),
    "test_architectures::test_rope_scaling_is_that_of_transformers": ("model.rope_original_length",),
    "test_architectures::test_the_speedrun_initialization_starts_at_the_embeddings": ("model.init",),
    "test_adapters::test_an_adapter_changes_the_output_but_not_at_first_where_it_can": (
        *("model.adapter.kind", "model.adapter.tokens"),
    ),
    "test_adapters::test_every_option_of_lora_changes_something": (
        *("model.adapter.rank", "model.adapter.alpha", "model.adapter.targets", "model.adapter.dropout"),
    ),
    "test_adapters::test_padding_never_leaks": ("task.pooling",),
    "test_rows::test_labels_are_those_of_the_training_rows": ("task.labels",),
    "test_rows::test_lists_of_labels_make_the_task_multi_label": ("task.multi_label",),
    "test_chats::test_a_prompt_has_the_ids_that_it_has_in_training": ("task.template",),
    "test_rows::test_an_encoding_can_be_named": ("data.encoding",),
    "test_rows::test_tabs_have_no_quotes_unless_they_are_asked_for": ("data.quoting",),
    "test_rows::test_fields_have_the_names_that_the_config_gives": (
        *("task.label_field", "task.tokens_field", "task.tags_field", "task.prompt_field", "task.response_field"),
        "task.messages_field",
    ),
    "test_labelled::test_balanced_weights_make_classes_equal": ("task.class_weights",),
    "test_labelled::test_augmentation_changes_texts_but_neither_ends_nor_validation": (
        *("task.augment_delete", "task.augment_swap"),
    ),
    "test_labelled::test_a_words_label_stands_at_its_last_token_plus_the_lookahead": (
        *("task.lookahead", "task.max_tokens"),
    ),
    "test_heads::test_a_pair_is_read_as_start_first_delimiter_second_extract": ("task.second_field", "task.delimiters"),
    "test_heads::test_a_layer_mixture_is_the_softmax_weighted_sum_of_all_normalised_layers": ("task.layer_mixture",),
    "test_heads::test_a_bag_of_words_is_a_linear_model_over_tf_idf_beside_the_head": (
        "task.bag_of_words",
        "task.bag_share",
    ),
    "test_heads::test_both_orders_add_their_representations": ("task.both_orders",),
    "test_heads::test_a_wrong_row_is_named": ("task.candidates_field",),
    "test_heads::test_the_auxiliary_loss_is_the_mean_over_tokens_times_its_weight": ("task.lm_weight",),
    "test_heads::test_numbers_are_standardized_by_the_training_rows": ("task.means", "task.deviations"),
    "test_preferences::test_dpo_is_equation_7_of_the_paper": ("task.beta",),
    "test_preferences::test_a_wrong_row_is_named": ("task.chosen_field", "task.rejected_field"),
    "test_functions::test_functions_of_the_user_read_rows_weigh_errors_and_score": (
        *("task.rows", "task.loss", "task.metric"),
    ),
    "test_answers::test_windows_overlap_and_each_token_of_the_text_can_be_found": ("task.stride",),
    "test_answers::test_a_wrong_row_is_named": ("task.question_field", "task.answers_field", "task.no_answer"),
    "test_reinforce::test_the_gradient_is_that_of_policy_gradient_and_kl": ("task.kl_weight",),
    "test_reinforce::test_wrong_input_is_named": ("task.reward", "task.response_tokens", "task.group_size"),
    "test_small_data::test_synonyms_replace_words_of_training_texts": ("task.synonyms", "task.augment_synonyms"),
    "test_small_data::test_every_row_is_validated_in_one_fold": ("task.folds", "task.fold"),
    "test_small_data::test_mixout_replaces_a_share_of_the_weights_and_keeps_their_expectation": ("finetune.mixout",),
    "test_small_data::test_the_rate_is_a_share_of_that_of_the_base": ("finetune.base_rate",),
    "test_finetune::test_several_tasks_share_a_model": ("task.kind", "task.validation_path"),
    "test_finetune::test_what_is_frozen_keeps_its_bits_and_what_learns_changes": (
        *("finetune.train", "finetune.top_k", "finetune.paths"),
    ),
    "test_finetune::test_deeper_layers_learn_slower_and_the_head_at_its_own_rate": (
        *("finetune.layer_decay", "finetune.head_learning_rate"),
    ),
    "test_schedules::test_a_fraction_is_a_number_of_steps_rounded_up": ("optim.warmup_fraction", "optim.warmup_rule"),
    "test_schedules::test_epochs_are_as_many_steps_as_hold_their_tokens": ("train.num_epochs",),
    "test_properties_training::test_wsd_decays_over_its_share_of_the_steps": ("optim.wsd_decay_fraction",),
    "test_optimizers::test_every_option_of_an_optimizer_changes_its_result": (
        *("optim.muon_learning_rate", "optim.muon_beta", "optim.embedding_rate", "optim.head_rate"),
        "optim.factored_decay",
    ),
    "test_learning::test_mup_scales_each_parameter_as_the_papers_table": ("model.mup_base_width",),
    "test_learning::test_the_noise_scale_compares_micro_batches_with_the_batch": ("train.noise_scale",),
    "test_learning::test_a_run_with_ramps_and_averages_resumes_exactly": ("train.batch_ramp", "train.length_ramp"),
    "test_sinks::test_the_options_turn_sinks_on": ("log.tensorboard", "log.wandb", "log.trackio", "log.mlflow"),
    "test_by_layer::test_a_run_writes_them_and_the_report_draws_them": ("log.by_layer", "log.activations"),
    "test_sinks::test_sinks_get_the_project": ("log.project",),
    "test_objectives::test_batches_are_functions_of_seed_and_step": ("task.objective.kind",),
    "test_objectives::test_spans_have_the_rate_and_length_asked_for": (
        *("task.objective.rate", "task.objective.span_length"),
    ),
    "test_objectives::test_the_first_position_says_whether_the_second_part_follows": ("task.objective.next_sentence",),
    "test_objectives::test_whole_words_are_masked_together": ("task.objective.whole_words",),
    "test_objectives::test_the_rates_of_filling_are_those_asked_for": (
        *("task.objective.fill_rate", "task.objective.suffix_first"),
    ),
    "test_objectives::test_each_head_has_the_target_so_many_tokens_ahead": ("task.objective.ahead",),
    "test_seq2seq::test_logits_are_those_of_t5": ("model.encoder_layers",),
    "test_seq2seq::test_a_pair_without_a_side_is_named": ("task.source_field", "task.target_field"),
    "test_architectures::test_whole_texts_and_prefixes_are_those_of_numpy": ("model.bidirectional",),
    "test_step::test_step_does_not_depend_on_the_mesh": ("mesh.data", "mesh.fsdp", "mesh.tensor"),
    "test_parallel::test_unshardable_runs_are_rejected": ("mesh.context", "mesh.stage"),
    "cluster/test_agreement::test_wrong_options_are_named": (
        *("cluster.coordinator", "cluster.num_processes", "cluster.process_id", "cluster.detect"),
    ),
    "faults/test_cluster::test_a_process_that_never_comes_is_told": ("cluster.start_timeout",),
    "faults/test_cluster::test_a_process_that_is_silent_ends_the_other": ("cluster.lost_timeout",),
}
NAMED = {option: test for test, options in ELSEWHERE.items() for option in options}


def test_every_option_is_flipped_or_has_a_test():
    assert FLIPPED | NAMED.keys() == set(flag_types(Config))
    assert not FLIPPED & NAMED.keys()


@functools.cache
def parsed(module: str) -> ast.Module:
    return ast.parse((TESTS / f"{module}.py").read_text(encoding="utf-8"))


def mentions(node: ast.AST, field: str, names: set[str]) -> bool:
    """Whether an expression sets `field`, or uses one of `names`."""
    for part in ast.walk(node):
        match part:
            case ast.keyword(arg=name) | ast.Attribute(attr=name):
                found = name == field
            case ast.Constant(value=str(text)):  # a key, a flag, or YAML
                found = text == field or re.search(rf"--\S*\.{field}$|[{{ ]{field}: ", text) is not None
            case ast.Name(id=name):
                found = name in names or name == field
            case _:
                found = False
        if found:
            return True
    return False


def bound(target: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}


def depending_names(tree: ast.Module, test: ast.FunctionDef, field: str) -> set[str]:
    """Names in a test whose values may depend on `field`."""
    names: set[str] = set()
    for node in tree.body:  # constants and fixtures of the module
        if isinstance(node, ast.Assign) and mentions(node.value, field, names):
            names |= {name for target in node.targets for name in bound(target)}
        if isinstance(node, ast.FunctionDef) and node.decorator_list and not node.name.startswith("test"):
            names |= {node.name} if mentions(node, field, names) else set()
    constants = {bound(node.targets[0]).pop(): node.value for node in tree.body if isinstance(node, ast.Assign)}
    for mark in test.decorator_list:
        mark = constants.get(mark.id, mark) if isinstance(mark, ast.Name) else mark
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.parametrize":
            given = ast.literal_eval(mark.args[0])
            if any(mentions(value, field, names) for value in mark.args[1:]):
                names |= set(given.split(",") if isinstance(given, str) else given)
    while True:
        before = set(names)
        for node in ast.walk(test):
            match node:
                case ast.Assign(targets=targets, value=value):
                    pairs = [(target, value) for target in targets]
                case ast.NamedExpr(target=target, value=value) | ast.AugAssign(target=target, value=value):
                    pairs = [(target, value)]
                case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
                    pairs = [(target, value)]
                case ast.withitem(context_expr=value, optional_vars=ast.AST() as target):
                    pairs = [(target, value)]
                case ast.FunctionDef(name=name, body=body) if node is not test:
                    pairs = [(ast.Name(name), part) for part in body]
                case ast.Call(func=ast.Attribute(value=ast.Name() as target), args=args):  # it may change its object
                    pairs = [(target, value) for value in args]
                case _:
                    pairs = []
            for target, value in pairs:
                names |= bound(target) if mentions(value, field, names) else set()
        names |= {"capsys"} if names else set()  # what is done with them may print
        if names == before:
            return names


def asserts(test: ast.FunctionDef, field: str, names: set[str]) -> bool:
    for node in ast.walk(test):
        match node:
            case ast.Assert(test=checked):
                found = mentions(checked, field, names)
            case ast.With(items=items) if "pytest.raises" in ast.unparse(items[0]):
                found = mentions(node, field, names)
            case ast.Call() if "assert_" in ast.unparse(node):
                found = mentions(node, field, names)
            case _:
                found = False
        if found:
            return True
    return False


@pytest.mark.parametrize("option", NAMED)
def test_the_named_test_sets_the_option_and_asserts_what_follows(option):
    module, name = NAMED[option].split("::")
    [test] = [node for node in parsed(module).body if isinstance(node, ast.FunctionDef) and node.name == name]
    field = option.rpartition(".")[2]
    names = depending_names(parsed(module), test, field)
    assert names or mentions(test, field, set()), f"{name} does not set {option}"
    assert asserts(test, field, names), f"no assertion of {name} depends on {option}"

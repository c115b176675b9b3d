"""The contract as rules that can be run."""

from harness.rules import model, training
from harness.rules.subject import BACKBONES, RECIPE, Broken, Rule, Subject, random_data

RULES: tuple[Rule, ...] = (
    model.leaves_the_backbone_alone, model.keeps_parameter_names, training.gradients_reach_what_is_trained,
    training.trains_within_its_shares, model.maps_images_to_logits, model.shapes_are_final, model.checkpoint_round_trip,
    model.deployed_equals_sparse, model.deployed_can_be_saved, model.predictions_do_not_depend_on_the_batch,
    model.report_is_consistent, model.evaluation_reports_the_same, model.costs_can_be_counted,
    model.waits_for_the_device_once, model.compiles_in_one_graph, training.deterministic_by_seed,
    training.goes_on_after_an_interruption, training.can_be_divided, training.two_processes_equal_one,
)  # fmt: skip

__all__ = ["BACKBONES", "RECIPE", "RULES", "Broken", "Rule", "Subject", "random_data"]

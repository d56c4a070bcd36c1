"""The parts of benchmark scripts, one idea per module.

Measuring and reporting:

* `measure`: repeated readings of several cases, their medians and quartiles.
* `records`: the JSON record of a run, where it is written, its figure.
* `timed_record`: a record that has limited time.
* `tables`: a table as text and as Markdown.
* `bandwidth`: memory bandwidth of the device, by data sheet and by a copy.

What is run:

* `presets`: decoders with random parameters, and their drafts.
* `trained`: the policy and the prompts of a run of `train.grpo`.
* `workloads`: completions whose lengths are planned.
* `tasks`: one sampling request, ready to run.
* `runners`: `er_jax.rollout` on a task, under one control.
* `static_batch`: the baseline without a scheduler.
* `peers`: the baseline of another library.
* `passes`: one pass over the weights, compiled and timed.
* `pass_bytes`: the bytes that a pass must read.
* `pass_points`: the record of timed passes.
* `draft_formats`: drafts by quantization format.
* `views`: what of the target's cache a draft reads.
* `corpus`: real text that every machine has.
* `text_model`: a byte-level policy trained on it.
* `subjects`: a policy with surveyed costs and measured acceptance.
* `schedules`: random rollouts for the fuzzer.
* `chains`: rollouts that several processes sample, one after another, and their ends.
* `life_process`: what each of these processes does, and leaves behind.
* `stored_programs`: compiled programs on a disk, for processes that live for a second.

How often drafts are kept:

* `kept_formats`: by format, drafting in every round of a trained policy.
* `kept_views`: by what drafts read, at every position of sampled texts.
* `kept_chances`: the closed forms.
* `whole_texts`: passes of a target, and of drafts beside its cache, over whole texts.

What stands in for a part of the library:

* `simulated`: engines that need no device.
* `controllers`: controllers and latency tables that do as a benchmark wants.
* `moments`: an act at the n-th window, prefill, move, answer or write.
* `rooflines`: costs of models on accelerators, by their data sheets or as published.

What results are compared with:

* `agreement`: two sets of completions, with ties told apart from wrong tokens.
* `reference`: completions computed one token at a time.
* `survival`: what an ended process has left, with what there was and must be.
* `device_check`: tokens and logits of an accelerator against those of a CPU.
"""

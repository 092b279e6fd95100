"""Reinforcement learning from rules: what is asked and what answers earn.

`tasks` turns rows of a file into questions and knows what is right (`gsm8k`, `mathematics`, `multiple_choice`, `code`,
`humaneval`, `logic`, `countdown`, `arithmetic`: modules that are imported by name); `grader` turns completions into
rewards, the package's (`rewards`; `code_reward`, in a `sandbox`) or a user's, what may hang in processes that are
killed then (`workers`). None of these knows of models or of the workflow that uses it; `rollout` samples, `samples` are
what a batch is made of, and `advantages` what their rewards are worth.
"""

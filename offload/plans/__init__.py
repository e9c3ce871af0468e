"""What a model, a policy and a machine come to: `penstock plan`.

A `Planner` chooses what a policy leaves open for a `Workload` (a task and the length of
its rows): it tries policies, whose `Forecast` is the model as the policy arranges it
with a cost model, and keeps the best `Choice`. `MemorySizes` divides the machine's
memory. A `SharedPlanner` (`rank_plans`, `ranked`, `tensor_ranked`) plans for ranks that
share the model, each on a part of the machine; `ways` compares that with other uses of
several devices (`devices`), of which `formulas` describe some. `make_plan` does so for
each dtype in question and returns a `Plan`, which `words.py` puts into sentences.
`prediction.py` predicts a job that has run, for its report; `PlanTrial` tries advice.
"""

"""Decisions from a fitted law: how large, how long, how many bits, and what to measure next.

`plan` allocates a budget, priced by `cost`; `critical` says from where on more data hurts; and
`next_runs` which runs would tell most. All of them ask the law at the fit's optimum and at its
bootstrap draws (`draws`) alike, for any law.
"""

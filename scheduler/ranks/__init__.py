"""Several ranks (processes) run one model: who computes what, and in which order.

owners            deals the blocks of a model to ranks
RankStages            which stages of a forward this rank computes
  CallState       where one micro-batch is: its lap, its stage, its number of calls
Message, Address  what ranks send to each other, and what finds it again
Post              sends messages; Mailbox keeps those that came
Lockstep          one run of a sweep, in step with the same run on the other ranks
LoadOrder         which unit ranks that gather weights load next
"""

"""How stacked experts run piece by piece, and in part on each of several ranks.

ExpertPairs     the (token, choice) pairs of a call, in the order of their experts
ExpertProducts  what a range of experts makes of its pairs
ExpertOutput    the output of a call, of what all pairs give
DenseExperts    experts that each get tokens of their own, piece by piece
ExpertRanks     what this rank computes of a call, and how it gets the rest
"""

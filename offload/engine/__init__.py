"""The engine that streams the weights of one model.

build()          makes all parts of an Engine and connects them
Engine           owns the parts; close() ends them, Life does if it is dropped
  Weights        (groups) where weights are, and how they come into modules
  Forwards       (groups) how forwards run on them
  SiteHooks      forward hooks on the model's modules, which call
    ForwardEntry   (scheduler) lets a forward in once its weights are loaded
  RoutedExperts  the forward of stacked experts, piece by piece
    HostCache      keeps those in host memory that are used most
    HostExperts    lets the CPU compute some of them there, beside an accelerator
  Tiers          where weights are kept, and how they get into slots
    open_reader()  the reader of files that the policy asks for
  Sweeps         (scheduler) all sweeps over the model, and their counters
  Updates        replaces weights while the model is in use
  Fallbacks      (io) what could not be had as asked: all parts announce it there
  Compilation    one compiled function for all blocks that are alike
"""

"""Run tiny models on real ranks, and compare what they train with what one process trains.

What the truth suite is made of: `rank` is the program that torchrun starts; it builds, parallelizes and
trains each `cases.Case`, compares every gradient with one process, and reports how the case ended. `runner`
starts it, and goes on behind a case that hangs or takes a rank down. The real code path of the installed
torchtitan, on the CPU over gloo where there are not enough GPUs. `shrink` makes the config of any model small
without changing what its degrees can split.

It is imported by name: nothing else of this package needs it. It takes torch, torchtitan, and Linux.
"""

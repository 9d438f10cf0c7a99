"""Measurements on real models: live bytes, costs per operation, gradient cosines, step times, training rates."""

from horizonplan.probes.cosine import cosine
from horizonplan.probes.memory import memory
from horizonplan.probes.method import method
from horizonplan.probes.profile import Profile, profile
from horizonplan.probes.rate import rollout
from horizonplan.probes.sample import Sample
from horizonplan.probes.time import time
from horizonplan.probes.tracker import Flops, LiveBytes

__all__ = ["Flops", "LiveBytes", "Profile", "Sample", "cosine", "memory", "method", "profile", "rollout", "time"]

"""The machine around the training: commands without a recipe, each a module with a function `main(words) -> int`."""

COMMANDS = {
    "doctor": "say whether this machine is set up right, what holds it back, and the cure",
    "bench": "measure how fast this machine trains, writes text and draws images",
    "backup": "copy finished runs, recipes and captions to another disk, and back",
    "monitor": "watch temperature, power, memory and disks: a log, alerts, Prometheus",
}

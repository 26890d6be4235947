"""What a meta-model would know of a finished run: its real steps, fitted again, without a policy.

    python refit.py runs/DIR                              # as it was trained
    python refit.py runs/DIR -- --model-updates 4 --B 7   # with other flags of m3po.py
    python refit.py runs/DIR --passes 5                   # each fit goes through all rows 5 times

D_env of the run's checkpoint.pt is collected again in its order, with a fit after the warm-up and
every --fit-every steps. Every fifth episode is kept from the model. One line says what it explained
of the rows that were fresh at each fit, and in the end of the episodes it never saw. So a setting
of the model is screened in minutes, on the same data.
"""

import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import flags
import m3po
import speed
from diagnostics import on_episodes
from rollouts import EnvBuffer

HELD = 5  # every so many-th episode is kept from the model


def recorded(folder):
    """The checkpoint of a run of m3po.py; ends the program where there is none."""
    try:
        return checkpoint.read(Path(folder) / "checkpoint.pt", "run", "m3po")
    except checkpoint.CheckpointError as error:
        raise SystemExit(f"refit.py: error: {error}") from None


def refit(rows, args, env, passes=None, upto=None):
    """{name: number} of a model that is fitted to D_env's rows (a state_dict of an EnvBuffer whose
    ring is not full) as they came in. upto: of the first so many rows."""
    model = m3po.build(args, env, "cpu")[1]
    if rows["total"] > len(rows["tokens"]):
        raise SystemExit("refit.py: error: the run's first steps are overwritten (--env-capacity)")
    n = min(rows["total"], upto or rows["total"])
    O, A = model.obs_dim, model.act_dim
    shown, held = EnvBuffer(n, O, A, args.L), EnvBuffer(n, O, A, args.L)
    episode, fresh, seconds = -1, [], 0.0
    starts = (rows["age"][:n] == 0).tolist() + [True]
    for i in tqdm(range(n), unit="row", leave=False, disable=None):
        episode += starts[i]
        obs, action, reward = rows["tokens"][i].split([O, A, 1])
        D = held if episode % HELD == HELD - 1 else shown
        D.add(obs, action, reward.item(), rows["next_obs"][i], bool(rows["terminated"][i]),
              starts[i + 1])
        if i + 1 >= args.warmup and (i + 1 - args.warmup) % args.fit_every == 0:
            begin, new = time.perf_counter(), shown.total - model.seen.item()
            if passes and new:
                train = len(shown.rows(holdout=False))
                model.steps_per_row = passes * train / args.model_batch / new
            found = model.fit(shown)
            seconds += time.perf_counter() - begin
            fresh += [[found[f"fresh_explained_{what}"] for what in ("reward", "obs")]
                      ] if "fresh_nll" in found and new else []
    if not fresh or not len(held):
        raise SystemExit(f"refit.py: error: {n} rows hold no two fits or no episode to keep back")
    half = torch.tensor(fresh)[len(fresh) // 2:].mean(0).tolist()
    result = {"fresh, second half r": half[0], "o": half[1]}
    result |= {f"held-out episodes {name}": value.item()
               for name, value in on_episodes(model, held).items()}
    return result | {"seconds of fits": seconds}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    p = flags.OneLineParser("refit.py", description=__doc__.split("\n\n")[0],
                            epilog="what follows -- are flags of m3po.py")
    p.add_argument("run", help="folder of a run of m3po.py with its checkpoint.pt")
    p.add_argument("--passes", type=flags.count, help="over all rows, each fit; else as the flags")
    p.add_argument("--rows", type=flags.count, help="only the first so many")
    p.add_argument("--seed", type=flags.natural, default=0, help="of the model (%(default)s)")
    options = p.parse_args(argv[:cut])
    state = recorded(options.run)
    parser = flags.build_parser()
    given = vars(parser.parse_args(argv[cut + 1:]))
    args = Namespace(**flags.completed(state["flags"]) | given | {"device": "cpu"})
    env = m3po.make_env(args)
    flags.check_angles(parser, args, env)
    speed.set_threads(args)
    torch.manual_seed(options.seed)
    found = refit(state["D_env"], args, env, options.passes, options.rows)
    print(", ".join(f"{name} {value:.3f}" for name, value in found.items()))


if __name__ == "__main__":
    main()

"""M3PO: Meta-Model-Based Meta-Policy Optimization (Hiraoka et al., ACML 2021), Algorithm 2.

    python m3po.py --env point-fwd-bwd                          # two minutes on two CPU cores
    python m3po.py --env ant-fwd-bwd --k 1 --model-updates 1    # the paper's sizes: 200 epochs

A meta-model is fitted to real data; short rollouts in it, branched from real histories, and those
data themselves feed a SAC meta-policy that adapts to a hidden, changing task from the last L steps
it saw.

    paper          here                          shape / unit                file
    h_{L:t}        tokens, mask, obs             [L, B, D], [L, B], [B, O]   rollouts.py (contract)
    z_t            HistoryNet.encode             [members, B, 5]             model.py
    p_theta        MetaModel (fit, sample)       an ensemble of --B members  model.py
    pi_phi, Q      MetaPolicy (act, update)      [B, A] in [-1, 1], [2, B]   policy.py
    D_env          EnvBuffer                     ring of real steps          rollouts.py
    D_model        ModelBuffer                   ring of imagined steps      rollouts.py, full.py
    tau (task)     info["task"], never in obs                                envs.py
    C_Th1, C_Th2   full_rollout_gap, ...                                     bounds.py

Here B, alone in a shape, is a batch; --B counts the members.

The clocks of one run (Table 2, where k is 1; halfcheetah-fwd-bwd):

    run        N = 200 epochs
    epoch      E = 1000 env steps, then one evaluation of 50 episodes
    env step   M = 1000 model rollouts of k = 2 model steps, then G = 40 policy updates
    fit        every `--fit-every` env steps (the paper: once per epoch)
"""

import signal

if __name__ == "__main__":  # while torch is imported Ctrl-C just ends it; then see faults.run
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from argparse import Namespace
from contextlib import closing

import torch

import checkpoint
import diagnostics
import envs
import faults
import flags
import speed
from checkpoint import Progress
from evaluation import Players
from full import FullBuffer
from logs import Log, clock
from model import MetaModel
from policy import LOGGED, MetaPolicy
from rollouts import Batch, EnvBuffer, ModelBuffer


def main(args, env, state=None):
    """Algorithm 2. Returns the number of the signal that stopped it, or None."""
    # The evaluation's processes come first: they are forked before any thread or GPU is used.
    players = make_players(args, lambda: build(args, env, "cpu")[0])
    speed.set_threads(args)
    policy, model, D_env, D_model, progress = begin(args, env, state)  # line 1
    update = speed.fastest_update(policy, model, args)  # policy.update, perhaps compiled
    log = Log(args, env, progress)
    parts = dict(policy=policy, model=model, D_env=D_env, D_model=D_model)
    save = lambda: checkpoint.save(args, progress, **parts)

    with (closing(players), faults.StopSignals() as stop,
          faults.saved_first(args, progress, policy, save), closing(log)):
        obs = checkpoint.replay(env, progress, args.seed)  # env.reset, in a new run
        for epoch in range(progress.epoch + 1, args.N + 1):  # line 2
            beta = model_fraction(args, epoch)
            while progress.step < epoch * args.E and not stop.received:  # line 4
                learning = progress.step >= args.warmup
                if learning and (progress.step - args.warmup) % args.fit_every == 0:
                    with clock(progress, "fit"):  # more often than the paper: DEVIATIONS 3
                        # The policy's inputs by D_env's mean and std of now: DEVIATIONS 6.
                        progress.note_shift(policy.restandardise(D_env))
                        progress.note_fit(model.fit(D_env) if beta > 0 else {})  # line 3
                with clock(progress, "env"):
                    action = act(policy, D_env, obs, learning)
                    obs = real_step(env, D_env, progress, args, obs, action)  # line 5
                if learning and beta > 0:
                    with clock(progress, "rollouts"):
                        D_model.rollout(policy, model)  # lines 6-9
                if learning and args.G and (beta == 0 or D_model.has_rows()):
                    with clock(progress, "updates"):
                        batches = sample_batches(D_model, D_env, beta, args.G, args.batch_size)
                        progress.note([update(batch, noise) for batch, noise in batches])  # 10-12
                log.step()
            faults.check_finite(progress, policy, args.E)
            if progress.step == epoch * args.E:
                columns = measure(args, progress, beta, **parts)
                log.finish_epoch(policy, players, columns)
                D_model.stats.zero_()
                checkpoint.keep_best(progress, **parts)
            if stop.received or epoch % args.checkpoint_every == 0 or epoch == args.N:
                save()
            if stop.received:
                return stop.received
        log.end()


# ---- line 1 -------------------------------------------------------------------------------------


def begin(args, env, state):
    """Policy, meta-model, D_env, D_model and Progress: new, or as the checkpoint has them."""
    torch.manual_seed(args.seed)
    policy, model = build(args, env, args.device)
    capacity = min(args.N * args.E, args.env_capacity)
    D_env = EnvBuffer(capacity, policy.obs_dim, policy.act_dim, args.L, args.device)
    ends = envs.terminated_fn(env)
    if args.rollout == "full":
        D_model = FullBuffer(D_env, args.M, args.retain, ends, envs.time_limit(env))
    else:
        D_model = ModelBuffer(D_env, args.M, args.k, args.retain, ends)
    progress = Progress(torch.zeros(args.E, len(LOGGED), device=args.device), LOGGED)
    if state is not None:
        checkpoint.restore(state, progress, policy=policy, model=model, D_env=D_env,
                           D_model=D_model)
    return policy, model, D_env, D_model, progress


def build(args, env, device):
    """Policy and meta-model, untrained."""
    O, A = env.observation_space.shape[0], env.action_space.shape[0]
    token_dim = 0 if args.L == 0 else O + A if args.no_token_reward else O + A + 1
    widths = (args.width,) * 2
    policy = MetaPolicy(O, A, token_dim, widths, args.z_dim, args.gamma, args.tau, args.lr,
                        args.alpha, args.target_entropy, args.layer_norm,
                        args.newest_token, args.token_changes, args.reward_scale,
                        args.angles).to(device)
    shape = dict(members=args.B, widths=widths, z_dim=args.z_dim, token_dim=token_dim,
                 layer_norm=args.model_layer_norm, newest=args.newest_token,
                 changes=args.token_changes)
    if args.model == "mlp":  # M2PO: MBPO's ensemble
        shape = dict(members=7, elites=5, widths=(200,) * 4, token_dim=0)
    model = MetaModel(O, A, **shape, lr=args.model_lr, weight_decay=args.model_decay,
                      batch_size=args.model_batch, beta_nll=args.beta_nll,
                      reward_weight=args.reward_weight, steps_per_row=args.model_updates,
                      angles=args.angles).to(device)
    return policy, model


# ---- lines 5 to 12 ------------------------------------------------------------------------------


def act(policy, D_env, obs, learning):
    """The action [A] for the real step: uniform before the warm-up is over, then a ~ pi(h_t)."""
    if not learning:
        return torch.rand(policy.act_dim).numpy() * 2 - 1
    obs = torch.as_tensor(obs, device=D_env.device)[None]
    return policy.act(*D_env.live_window(), obs)[0].cpu().numpy()


def real_step(env, D_env, progress, args, obs, action):
    """Line 5: one step of the real env into D_env; returns the next observation to act on."""
    next_obs, reward, terminated, truncated, info = env.step(action)
    progress.step += 1
    progress.actions.append(action.tolist())  # float32 to float loses nothing
    truncated = truncated or len(progress.actions) == args.reset_every
    if "fault" in info:  # the simulator failed: this transition is no data
        progress.dropped += 1
        progress.faults[info["fault"]] = progress.faults.get(info["fault"], 0) + 1
        D_env.end_episode()
    else:
        D_env.add(obs, action, reward, next_obs, terminated, truncated)
        progress.train_return += float(reward)
    if not (terminated or truncated):
        return next_obs
    progress.train_returns.append(progress.train_return)
    progress.episode, progress.actions, progress.train_return = progress.episode + 1, [], 0.0
    return env.reset(seed=envs.seeds(args.seed, 0, progress.episode)[0])[0]


def model_fraction(args, epoch):
    """beta, the fraction of D_model in a batch (App. A.8; the printed formula is identically 0)."""
    if args.hybrid is None:
        return args.beta
    a, b = args.hybrid
    return min(max(1 - (epoch - a) / (b - a), 0.0), 1.0)


def sample_batches(D_model, D_env, beta, n, batch_size):
    """n pairs of a Batch and noise [2, B, A] for its update, from one gather: a fraction beta of
    each Batch from D_model, the rest from D_env."""
    noise = torch.randn(n, 2, batch_size, D_env.act_dim, device=D_env.device)
    imagined = round(beta * batch_size)
    sizes = (D_env, batch_size - imagined), (D_model, imagined)
    drawn = [source.sample(n * size).minibatches(n) for source, size in sizes if size]
    batches = drawn[0] if len(drawn) == 1 else map(Batch.join, drawn[1], drawn[0])
    return zip(batches, noise)


# ---- what an epoch ends with --------------------------------------------------------------------


def measure(args, progress, beta, policy, model, D_env, D_model):
    """The columns of progress.csv that are M3PO's own. It touches no training stream."""
    epoch = progress.epoch + 1
    imagined, ended, nonfinite = D_model.stats.tolist()
    columns = {"q_shift": progress.q_shift, "beta": beta, "alpha": policy.log_alpha.exp().item(),
               "imagined": int(imagined), "terminated_share": ended / max(imagined, 1),
               "nonfinite_share": nonfinite / max(imagined, 1)}
    if args.diagnose_every and epoch % args.diagnose_every == 0 and len(D_env):
        with clock(progress, "diagnose"), closing(make_env(args)) as env:
            columns |= diagnostics.measure(policy, model, D_env, progress.fit, args, env, epoch)
    return columns


# ---- begin and end of a run, which baselines/ share ---------------------------------------------


def make_env(args):
    return envs.make(args.env, args.switch_every, args.oracle)


def make_players(args, make_policy):
    """Evaluation's envs, dealt to as many processes as this run may use cores, each with a policy
    from make_policy(). The toy's episodes are over in less time than that saves."""
    workers = 1 if args.env == "point-fwd-bwd" else speed.cores(args)
    return Players(lambda: make_env(args), make_policy, args.eval_episodes, workers, args.L)


def parse_args(argv=None, method="m3po"):
    """(args, env, state): the flags, the env they name, the checkpoint to resume or None. Whatever
    is wrong is said in one line, before anything is created."""
    args, state = flags.parse(argv, method)
    parser = flags.build_parser(method)
    try:
        env = make_env(args)
    except envs.EnvError as error:
        parser.refuse("env", error)
    flags.check_angles(parser, args, env)
    return args, env, state


def open_agent(folder, method="m3po"):
    """What agent.pt of a run folder, or a file such as RUN/best.pt, holds; its env and flags."""
    agent = checkpoint.read(checkpoint.agent_file(folder), "agent", method)
    args = Namespace(**flags.completed(agent["flags"] | {"method": method}))
    return agent, make_env(args), args


def load(folder, device="cpu"):
    """The trained agent of a run folder, or of RUN/best.pt: (policy, model, env, args). Its use:
    docs/USING.md."""
    agent, env, args = open_agent(folder)
    policy, model = build(args, env, device)
    policy.load_state_dict(agent["policy"])
    model.load_state_dict(agent["model"])
    return policy, model, env, args


def command_line():
    faults.run("m3po", main, *parse_args())


if __name__ == "__main__":
    command_line()

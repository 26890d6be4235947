"""An exported policy acts in an env: with onnxruntime, without torch.

    python -m pip install onnxscript onnxruntime
    python play.py agents/point-fwd-bwd --export policy.onnx
    python -m examples.onnx_policy policy.onnx
"""

import sys

import numpy as np
import onnxruntime

import envs


def run_episode(path, seed=0):
    """The return of one episode, the episode's actions [T, A]."""
    session = onnxruntime.InferenceSession(path)
    env = envs.make(session.get_modelmeta().custom_metadata_map["env"])
    state = np.zeros(session.get_inputs()[0].shape, np.float32)  # an episode begins
    reward, done, rewards, actions = 0.0, False, [], []
    obs, info = env.reset(seed=seed)
    while not done:
        inputs = {"state": state, "obs": obs, "reward": np.array([reward], np.float32)}
        action, state = session.run(None, inputs)
        obs, reward, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        rewards.append(reward)
        actions.append(action)
    return sum(rewards), np.array(actions)


if __name__ == "__main__":
    print(f"return {run_episode(sys.argv[1])[0]:.1f}")

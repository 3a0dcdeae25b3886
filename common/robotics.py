"""D4RL's Adroit and Kitchen, made of Gymnasium-Robotics' (an optional package), whose tasks of these names differ.

Adroit (`pen-human-v1`): a hand twirls a pen, opens a door, hammers a nail, carries a ball. Gymnasium-Robotics has a
wrong sign in the reward of the last three, lets pen go on when the pen has dropped, and steps as MuJoCo does today.
All that is undone. Kitchen (`kitchen-mixed-v0`): a robot arm does four things and gets 1 for each. Observations, noise,
rewards and ends are D4RL's; physics is only close to it where meshes touch.
"""

import contextlib
import io
from importlib.metadata import version

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from common import UserError, physics

ADROIT = {"pen": 100, "door": 200, "hammer": 200, "relocate": 200}  # steps of an episode
COMPLETE = ("microwave", "kettle", "light switch", "slide cabinet")
KITCHEN = {  # complete and partial are the same task, with other data
    "kitchen-complete-v0": COMPLETE,
    "kitchen-partial-v0": COMPLETE,
    "kitchen-mixed-v0": ("microwave", "kettle", "bottom burner", "light switch"),
}


def make(name: str, render_mode: str | None = None) -> gymnasium.Env:
    """The environment of a name in ADROIT or KITCHEN. Raises UserError if the package is missing or another version."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it says that rewards have changed, which is undone here
            import gymnasium_robotics
    except ImportError:
        raise UserError(f"{name} needs an optional package: pip install gymnasium-robotics==1.4.2") from None
    if version("gymnasium-robotics") != "1.4.2":  # other versions have other rewards
        raise UserError(f"{name} needs another version of a package: pip install gymnasium-robotics==1.4.2")
    gymnasium.register_envs(gymnasium_robotics)
    options = dict(render_mode=render_mode, disable_env_checker=True)  # it would find faults with the original
    if name in KITCHEN:
        env = gymnasium.make("FrankaKitchen-v1", robot_noise_ratio=0.1, object_noise_ratio=0.0, **options)
        return Kitchen(env, KITCHEN[name])
    return Adroit(gymnasium.make(f"AdroitHand{name.capitalize()}-v1", ADROIT[name], **options), name)


class Adroit(gymnasium.Wrapper):
    """D4RL's reward, end and physics."""

    def __init__(self, env: gymnasium.Env, name: str):
        super().__init__(env)
        self.name = name
        physics.restore_contacts(env.unwrapped.model)
        env.unwrapped._step_mujoco_simulation = self.simulate

    def simulate(self, control: np.ndarray, steps: int) -> None:
        self.unwrapped.data.ctrl[:] = control
        physics.step(self.unwrapped.model, self.unwrapped.data, steps)

    def step(self, action: np.ndarray):
        obs, reward, terminated, truncated, info = self.env.step(action)
        if self.name == "pen":
            return obs, reward, bool(obs[26] < 0.075), truncated, info  # the pen's height, in metres
        palm_to_object = {"door": obs[35:38], "hammer": obs[33:36] - obs[36:39], "relocate": obs[30:33]}[self.name]
        return obs, reward - 0.2 * np.linalg.norm(palm_to_object), terminated, truncated, info  # 0.1 of it was added


class Kitchen(gymnasium.Wrapper):
    """D4RL's observation (60,): 9 joints of the robot, 21 numbers of the objects, both noisy, and 30 of the goal.

    The goal is zero but for the places of the things to do. One is done when its noisy place is less than 0.3 from the
    goal; the episode ends when all are.
    """

    NOISE = np.repeat([5e-4, 5e-5, 5e-4, 0.01, 5e-4, 0.01, 5e-4], [2, 6, 3, 3, 3, 3, 1])  # (21,): the largest

    def __init__(self, env: gymnasium.Env, things: tuple[str, ...]):
        from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_GOALS, OBS_ELEMENT_INDICES

        super().__init__(env)
        physics.restore_contacts(env.unwrapped.model)
        self.observation_space = Box(-np.inf, np.inf, (60,), np.float64)
        self.places, self.goal = {thing: OBS_ELEMENT_INDICES[thing] for thing in things}, np.zeros(30)
        for thing, place in self.places.items():
            self.goal[place] = OBS_ELEMENT_GOALS[thing]

    def observe(self, obs: dict) -> np.ndarray:
        noise = self.NOISE * self.unwrapped.robot_env.np_random.uniform(-1, 1, 21)
        return np.concatenate([obs["observation"][:9], obs["observation"][18:39] + noise, self.goal])

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.left = set(self.places)
        return self.observe(obs), info

    def step(self, action: np.ndarray):
        obs, _, _, truncated, info = self.env.step(action)
        obs = self.observe(obs)
        done = {thing for thing in self.left if np.linalg.norm((obs[:30] - self.goal)[self.places[thing]]) < 0.3}
        self.left -= done
        return obs, float(len(done)), not self.left, truncated, info

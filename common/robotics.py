"""D4RL's Adroit and Kitchen, made of Gymnasium-Robotics' (an optional package), whose tasks of these names differ.

Adroit (`pen-human-v1`): a hand of 24 to 30 joints twirls a pen, opens a door, hammers a nail, carries a ball. In
Gymnasium-Robotics the reward of the last three has a wrong sign, pen goes on when the pen has dropped, and the physics
is today's. All that is undone: steps agree with recordings of D4RL's own environments to 1e-8.

Kitchen (`kitchen-mixed-v0`): a robot arm has four things to do in a kitchen, and gets 1 for each. Observations, noise,
rewards and ends are D4RL's. Its physics is close to D4RL's, not equal: see README.
"""

import contextlib
import io
from importlib.metadata import version

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from common import UserError, physics

ADROIT = ("pen", "door", "hammer", "relocate")
KITCHEN = {
    "kitchen-complete-v0": ("microwave", "kettle", "light switch", "slide cabinet"),
    "kitchen-partial-v0": ("microwave", "kettle", "light switch", "slide cabinet"),  # another dataset, the same task
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
    steps = 100 if name == "pen" else 200
    return Adroit(gymnasium.make(f"AdroitHand{name.capitalize()}-v1", steps, **options), name)


class Adroit(gymnasium.Wrapper):
    """D4RL's reward, end and physics for a task of ADROIT."""

    def __init__(self, env: gymnasium.Env, name: str):
        super().__init__(env)
        self.name, model, data = name, env.unwrapped.model, env.unwrapped.data
        physics.restore_contacts(model)

        def simulate(control: np.ndarray, steps: int) -> None:
            data.ctrl[:] = control
            physics.step(model, data, steps)

        env.unwrapped._step_mujoco_simulation = simulate

    def step(self, action: np.ndarray):
        obs, reward, terminated, truncated, info = self.env.step(action)
        if self.name == "pen":
            return obs, reward, bool(obs[26] < 0.075), truncated, info  # the pen's height, in metres
        to_object = {"door": obs[35:38], "hammer": obs[33:36] - obs[36:39], "relocate": obs[30:33]}  # from the palm
        return (
            obs,
            reward - 0.2 * np.linalg.norm(to_object[self.name]),
            terminated,
            truncated,
            info,
        )  # it adds 0.1 of it


class Kitchen(gymnasium.Wrapper):
    """D4RL's observation (60,): 9 joints of the robot, 21 numbers of the objects, both noisy, and 30 of the goal.

    The goal is zero but for the places of the things to do. One of them is done when its noisy place is less than 0.3
    away from the goal; the episode ends when all are.
    """

    # of the positions of slides, buttons and lights, switches, doors, kettle; uniform in +-NOISE
    NOISE = np.repeat([5e-4, 5e-5, 5e-4, 0.01, 5e-4, 0.01, 5e-4], [2, 6, 3, 3, 3, 3, 1])  # (21,)

    def __init__(self, env: gymnasium.Env, elements: tuple[str, ...]):
        super().__init__(env)
        from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_GOALS, OBS_ELEMENT_INDICES

        physics.restore_contacts(env.unwrapped.model)
        self.observation_space = Box(-np.inf, np.inf, (60,), np.float64)
        self.places, self.goal = {element: OBS_ELEMENT_INDICES[element] for element in elements}, np.zeros(30)
        for element, place in self.places.items():
            self.goal[place] = OBS_ELEMENT_GOALS[element]

    def observe(self, obs: dict) -> np.ndarray:
        robot, objects = obs["observation"][:9], obs["observation"][18:39]
        noise = self.NOISE * self.unwrapped.robot_env.np_random.uniform(-1, 1, 21)
        return np.concatenate([robot, objects + noise, self.goal])

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.left = set(self.places)
        return self.observe(obs), info

    def step(self, action: np.ndarray):
        obs, _, _, truncated, info = self.env.step(action)
        obs = self.observe(obs)
        distance = {element: np.linalg.norm((obs[:30] - self.goal)[self.places[element]]) for element in self.left}
        done = {element for element in self.left if distance[element] < 0.3}
        self.left -= done
        return obs, float(len(done)), not self.left, truncated, info

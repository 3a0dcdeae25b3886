"""MuJoCo 2.1.0's physics, in which D4RL's data and scores were made, on today's MuJoCo.

Each function changes a fresh model in place, before its first step. Recordings of D4RL's own environments show that
nothing else is missing: see tests/test_environments.py, test_mazes.py and test_robotics.py.
"""

import mujoco
import numpy as np


def restore_capsules(model: mujoco.MjModel, keep_total_mass: bool = False) -> None:
    """Give a model of capsules and spheres the masses and inertias of MuJoCo before 2.1.1, in place.

    Until then a capsule of radius r whose cylinder has half-length h was taken for a cylinder of radius r and length
    L = 2h + r (2.1.1's changelog: "Computed capsule inertias are now exact"). The density is today's, unless the XML
    sets the total mass, as half_cheetah.xml does: then the total mass is. Geoms of the world may have any shape.
    """
    r, h = model.geom_size[:, 0], model.geom_size[:, 1]  # (G,) each
    capsule, moving = model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE, model.geom_bodyid > 0
    length, sphere = 2 * h + r, 4 / 3 * np.pi * r**3
    volume = np.where(capsule, np.pi * r**2 * length, sphere)
    exact_volume = np.where(capsule, 2 * np.pi * r**2 * h + sphere, sphere)
    mass = volume * model.body_mass.sum() / (volume if keep_total_mass else exact_volume)[moving].sum()  # (G,)
    axial = mass * r**2 * np.where(capsule, 1 / 2, 2 / 5)
    transverse = np.where(capsule, mass * (3 * r**2 + length**2) / 12, axial)
    moments = np.stack([transverse, transverse, axial], 1)  # (G, 3), along the geom's own axes: a capsule lies along z

    for body in range(1, model.nbody):  # 0 is the world
        geoms = np.flatnonzero(model.geom_bodyid == body)
        centre = mass[geoms] @ model.geom_pos[geoms] / mass[geoms].sum()
        inertia = np.zeros((3, 3))  # about the centre of mass, in the body's axes
        for g in geoms:
            rotation, d = np.zeros(9), model.geom_pos[g] - centre
            mujoco.mju_quat2Mat(rotation, model.geom_quat[g])
            rotation = rotation.reshape(3, 3)
            inertia += rotation @ np.diag(moments[g]) @ rotation.T  # R I R^T: the geom's axes -> the body's
            inertia += mass[g] * (d @ d * np.eye(3) - np.outer(d, d))  # parallel axes: m (|d|^2 1 - d d^T)
        principal, axes = np.linalg.eigh(inertia)
        axes[:, 0] *= np.linalg.det(axes)  # eigenvectors may be a reflection, a quaternion needs a rotation
        model.body_mass[body], model.body_ipos[body], model.body_inertia[body] = mass[geoms].sum(), centre, principal
        mujoco.mju_mat2Quat(model.body_iquat[body], axes.ravel())

    # The compiler left two notes that lean on the inertia's frame, and that frame has moved. "This geom has the pose of
    # its body's inertia" would turn the capsules; boxes around the geoms, beyond which no contact is looked for, would
    # let the head of a diving half-cheetah pass through the floor. Unsay the first, let the second hold everything;
    # but the world, which comes first, has not moved, and its boxes keep the walls of a maze quick to search.
    model.body_sameframe[:] = model.geom_sameframe[:] = 0
    model.bvh_aabb[model.body_bvhnum[0] :] = [0, 0, 0, 100, 100, 100]  # centre and half sizes, in metres
    mujoco.mj_setConst(model, mujoco.MjData(model))  # what follows from masses: inverse weights, subtree masses


def restore_margins(model: mujoco.MjModel) -> None:
    """Give the contacts of a model their margins of before MuJoCo 3.5.0, in place.

    The margin of a contact was the larger one of its two geoms' and is now their sum. In each of these models all geoms
    that touch have the same margin, so half of it on either side makes the old one.
    """
    if mujoco.mj_version() >= 350:  # 3.4.0 calls itself 340, 3.5.0 3005000
        model.geom_margin[:] /= 2
        model.geom_gap[:] /= 2


def restore_collisions(model: mujoco.MjModel) -> None:
    """Let a model find the contacts of meshes as MuJoCo before 3.2.3 did, in place."""
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_NATIVECCD | mujoco.mjtDisableBit.mjDSBL_MULTICCD
    model.opt.ccd_iterations = 50


def step(model: mujoco.MjModel, data: mujoco.MjData, steps: int) -> None:
    """mj_step with Euler's integrator, contacts in boxes as deep as they were in MuJoCo 2.1.0.

    There a sphere or capsule was never deeper in a box than its radius, and two boxes were half as deep in each other.
    """
    sphere, capsule, box = mujoco.mjtGeom.mjGEOM_SPHERE, mujoco.mjtGeom.mjGEOM_CAPSULE, mujoco.mjtGeom.mjGEOM_BOX
    for _ in range(steps):
        mujoco.mj_step1(model, data)
        now, geoms = data.contact.dist, data.contact.geom  # (C,), (C, 2)
        one, other = model.geom_type[geoms].T  # (C,) each, in the order sphere, capsule, box
        radius = model.geom_size[geoms[:, 0], 0]
        dist = np.where((one == sphere) | (one == capsule), np.maximum(now, -radius), now)
        dist = np.where(one == box, now / 2, dist)
        changed = np.flatnonzero((other == box) & (dist != now))
        for i in changed:
            data.contact[i].dist = dist[i]
        if len(changed):  # these stages come after the search for contacts, and have to be done again
            mujoco.mj_makeConstraint(model, data)
            mujoco.mj_island(model, data)
            mujoco.mj_projectConstraint(model, data)
            mujoco.mj_fwdVelocity(model, data)
        mujoco.mj_step2(model, data)

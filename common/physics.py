"""MuJoCo 2.1.0's physics, in which D4RL's data and scores were made, on today's MuJoCo.

Recordings of D4RL's own environments show that nothing more is missing: test_environments, test_mazes, test_robotics.
"""

import mujoco
import numpy as np


def restore_capsules(model: mujoco.MjModel, spec: mujoco.MjSpec) -> None:
    """Give a model, fresh from `spec`, the masses and inertias of MuJoCo before 2.1.1, in place; changes `spec` too.

    Until then a capsule of radius r whose cylinder has half-length h was taken for a cylinder of radius r and length
    2h + r (2.1.1's changelog: "Computed capsule inertias are now exact"). So the compiler weighs such cylinders.
    """
    for geom, (r, h, _), pos, quat in zip(spec.geoms, model.geom_size, model.geom_pos, model.geom_quat):
        if geom.type == mujoco.mjtGeom.mjGEOM_CAPSULE:
            geom.type, geom.size, geom.fromto = mujoco.mjtGeom.mjGEOM_CYLINDER, [r, h + r / 2, 0], [np.nan] * 6
            geom.pos, geom.quat = pos, quat
    old = spec.compile()
    for field in ("body_mass", "body_inertia", "body_ipos", "body_iquat", "body_sameframe", "geom_sameframe"):
        getattr(model, field)[:] = getattr(old, field)
    # No contact is looked for outside the boxes round a body, which lie in the frame of its inertia, and that frame has
    # moved: the head of a diving half-cheetah would pass through the floor. Let them hold everything, but for the
    # world's, which come first: it has not moved, and they keep the walls of a maze quick to search.
    model.bvh_aabb[model.body_bvhnum[0] :] = [0, 0, 0, 100, 100, 100]  # centre and half sizes, in metres
    mujoco.mj_setConst(model, mujoco.MjData(model))  # what follows from masses: inverse weights, subtree masses


def restore_contacts(model: mujoco.MjModel) -> None:
    """Give a fresh model the contacts of before MuJoCo 3.5.0 and its meshes those of before 3.2.3, in place.

    The margin of a contact was the larger one of its two geoms' and is now their sum. In each of these models all geoms
    that touch have the same margin, so half of it on either side makes the old one.
    """
    if mujoco.mj_version() >= 350:  # 3.4.0 calls itself 340, 3.5.0 3005000
        model.geom_margin[:] /= 2
        model.geom_gap[:] /= 2
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_NATIVECCD | mujoco.mjtDisableBit.mjDSBL_MULTICCD


def step(model: mujoco.MjModel, data: mujoco.MjData, steps: int) -> None:
    """mj_step with Euler's integrator, contacts in boxes as deep as they were in MuJoCo 2.1.0.

    There a sphere or capsule was never deeper in a box than its radius, and two boxes were half as deep in each other.
    """
    sphere, capsule, box = mujoco.mjtGeom.mjGEOM_SPHERE, mujoco.mjtGeom.mjGEOM_CAPSULE, mujoco.mjtGeom.mjGEOM_BOX
    for _ in range(steps):
        mujoco.mj_step1(model, data)
        now, geoms = data.contact.dist, data.contact.geom  # (C,), (C, 2)
        one, other = model.geom_type[geoms].T  # (C,) each, in the order sphere, capsule, box
        dist = np.where((one == sphere) | (one == capsule), np.maximum(now, -model.geom_size[geoms[:, 0], 0]), now)
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

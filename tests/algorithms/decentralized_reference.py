"""Slow, obvious numpy forms of the algorithms.

Each takes W (t -> (n, n)), G (X, k, draw -> gradients on the samples of step k), x0 (n, d), the
number of steps T and the rates eta(k), and returns the iterates X_1 .. X_T.
"""

import math

import numpy as np

# --- section 2 ------------------------------------------------------------------------------


def dnasa(W, G, X, T, *, a=1.0, c=1.0, constant=False, clip=True, layer=False, point="old",
          rounds=1, wd=0.0, l1=0.0, gt=False):  # fmt: skip
    n, out = len(X), []
    Z, U, V_prev = (np.zeros_like(X) for _ in range(3))
    parts = [slice(0, 8), slice(8, 16)] if layer else [slice(0, X.shape[1])]
    for k in range(T):
        base = T if constant else k + 1
        alpha, gamma = a * math.sqrt(n / base), c * n**0.25 / base**0.75
        if clip:
            alpha, gamma = min(1, alpha), gamma if constant else min(1, gamma)
        u = np.zeros_like(X)
        for i in range(n):
            for p in parts:
                norm = np.linalg.norm(Z[i, p])
                u[i, p] = Z[i, p] / norm if norm > 1e-30 else 0
        H = X - gamma * u
        H = np.sign(H) * np.maximum(abs(H) - gamma * l1, 0)
        Wm = np.linalg.matrix_power(W(k), rounds)
        P = {"old": X, "half": H, "new": Wm @ H}[point]
        V = G(P, k) + wd * P
        if gt:
            U, V_prev = U + V - V_prev, V
        X, Z, U = Wm @ H, Wm @ ((1 - alpha) * Z + alpha * (U if gt else V)), Wm @ U
        out.append(X)
    return out


# --- section 4 ------------------------------------------------------------------------------


def all_reduce(W, G, X, T, eta):
    out = []
    for k in range(T):
        X = X - eta(k) * G(X, k).mean(0)
        out.append(X)
    return out


def dsgd(W, G, X, T, eta, *, cta=False, beta=0.0, nesterov=False, mixed=False):
    m, out = np.zeros_like(X), []
    for k in range(T):
        g = G(X, k)
        m = beta * m + g
        if mixed:
            m = W(k) @ m
        step = eta(k) * (g + beta * m if nesterov else m)
        X = W(k) @ X - step if cta else W(k) @ (X - step)
        out.append(X)
    return out


def gradient_tracking(W, G, X, T, eta, *, cta=False, beta=0.0):
    """The published form: y moves after x, with the same W(k)."""
    g_old = y = G(X, 0)
    m, out = np.zeros_like(X), []
    for k in range(T):
        m = beta * m + y
        X = W(k) @ X - eta(k) * m if cta else W(k) @ (X - eta(k) * m)
        g = G(X, k + 1)
        y = W(k) @ y + g - g_old if cta else W(k) @ (y + g - g_old)
        g_old = g
        out.append(X)
    return out


def quasi_global(W, G, X, T, eta, *, beta=0.9, mu=0.9, nesterov=False):
    h, out = np.zeros_like(X), []
    for k in range(T):
        g = G(X, k)
        m = beta * h + g
        new = W(k) @ (X - eta(k) * (g + beta * m if nesterov else m))
        h = mu * h + (1 - mu) * (X - new) / eta(k)
        X = new
        out.append(X)
    return out


def qg_adam(W, G, X, T, eta, *, b1=0.9, b2=0.999, eps=1e-8):
    M, V, out = np.zeros_like(X), np.zeros_like(X), []
    for k in range(T):
        g = G(X, k)
        first = (b1 * M + g) / (1 - b1 ** (k + 1))
        second = (b2 * V + (1 - b2) * g * g) / (1 - b2 ** (k + 1))
        new = W(k) @ (X - eta(k) * first / (np.sqrt(second) + eps))
        q = (X - new) / np.linalg.norm(X - new, axis=1, keepdims=True)
        M, V = b1 * M + (1 - b1) * q, b2 * V + (1 - b2) * q * q
        X = new
        out.append(X)
    return out


def decentlam(W, G, X, T, eta, *, beta=0.9):
    m, out = np.zeros_like(X), []
    for k in range(T):
        m = beta * m + (X - W(k) @ (X - eta(k) * G(X, k))) / eta(k)
        X = X - eta(k) * m
        out.append(X)
    return out


def momentum_tracking(W, G, X, T, eta, *, beta=0.9):
    u, c, out = np.zeros_like(X), np.zeros_like(X), []
    for k in range(T):
        u = beta * u + G(X, k)
        X, c = W(k) @ X - eta(k) * (u - c), W(k) @ (c - u) + u
        out.append(X)
    return out


def d2(W, G, X, T, eta, *, lazy=True):
    """The form of the paper: two points and two gradients."""
    return edm(W, G, X, T, eta, beta=0.0, lazy=lazy)


def edm(W, G, X, T, eta, *, beta=0.9, lazy=True):
    M = (np.eye(len(X)) + W(0)) / 2 if lazy else W(0)
    m = (1 - beta) * G(X, 0)
    prev, X = X, M @ (X - eta(0) * m)
    out = [X]
    for k in range(1, T):
        new_m = beta * m + (1 - beta) * G(X, k)
        prev, X = X, M @ (2 * X - prev - (eta(k) * new_m - eta(k - 1) * m))
        m = new_m
        out.append(X)
    return out


def extra(W, G, X, T, eta):
    M, one = W(0), np.eye(len(X))
    g = G(X, 0)
    prev, X = X, M @ X - eta(0) * g
    out = [X]
    for k in range(1, T):
        g_new = G(X, k)
        prev, X = X, (one + M) @ X - (one + M) / 2 @ prev - (eta(k) * g_new - eta(k - 1) * g)
        g = g_new
        out.append(X)
    return out


def kgt(W, G, X, T, eta, *, K=3, outer=1.0):
    c, out = np.zeros_like(X), []
    for k in range(T):
        y = X
        for j in range(K):
            y = y - eta(k) * (G(y, k, j) + c)
        Dm = (X - y) / (K * eta(k))
        c = c - Dm + W(k) @ Dm
        X = W(k) @ (X - outer * K * eta(k) * Dm)
        out.append(X)
    return out


def mt_dsgt(W, G, X, T, eta, *, rounds=3, chebyshev=True):
    n = len(X)
    s = math.sqrt(1 - np.linalg.norm(W(0) - 1 / n, 2) ** 2)
    a = (1 - s) / (1 + s) if chebyshev else 0.0
    old = C = np.eye(n)
    for _ in range(rounds):
        old, C = C, (1 + a) * W(0) @ C - a * old
    return gradient_tracking(lambda k: C, G, X, T, eta)


# --- section 3: the D-NASA paper's own baselines ----------------------------------------------


def official(W, G, X, T, eta, *, tracks, synthetic=False):
    n, out = len(X), []
    if synthetic:
        V, g_old = np.zeros_like(X), np.zeros_like(X)
        for k in range(T):
            Xh = X - eta(k) * V
            g = G(Xh, k)
            V = W(k) @ (V + g - g_old) if tracks else g
            X, g_old = W(k) @ Xh, g
            out.append(X)
        return out
    g_old = Y = G(X, 0) / n
    for k in range(T):
        X = W(k) @ (W(k) @ X - eta(k) * Y)
        g = G(X, k + 1) / n  # "g at the new X, next sample"
        Y = W(k) @ Y + g - g_old if tracks else g
        g_old = g
        out.append(X)
    return out


def d_asagt(W, G, X, T, eta, *, synthetic=False, constant=False):
    n, Z, out = len(X), np.zeros_like(X), []
    for k in range(T):
        share = math.sqrt(n / (T if constant else k + 1))
        if synthetic:
            Xh = X - eta(k) * Z
            X, Z = W(k) @ Xh, W(k) @ ((1 - share) * Z + share * G(Xh, k))
        else:
            a, g = 0.3 * min(1, share), G(X, k) / n
            X, Z = W(k) @ ((1 - a) * X + a * (X - eta(k) * Z)), W(k) @ ((1 - a) * Z + a * g)
        out.append(X)
    return out

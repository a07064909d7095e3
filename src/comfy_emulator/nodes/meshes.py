"""3D nodes: latents, voxels, meshes and GLB files; every shape is a ball (`comfy_extras/nodes_hunyuan3d.py`)."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from comfy_emulator.node_api import NodeContext, NodeResult
from comfy_emulator.nodes.latents import Latent
from comfy_emulator.nodes.loaders import Vae
from comfy_emulator.nodes.pixels import FloatArray
from comfy_emulator.nodes.placeholder import seeded
from comfy_emulator.nodes.registry import REGISTRY
from comfy_emulator.nodes.save_paths import metadata_texts, output_path

_LATENT_CHANNELS = 64
_FINEST_GRID = 32

# Chunk types, component types and buffer targets of the GLB format:
# https://registry.khronos.org/glTF/specs/2.0/glTF-2.0.html
_CHUNK_JSON, _CHUNK_BINARY = 0x4E4F534A, 0x004E4942
_FLOAT, _UNSIGNED_INT = 5126, 5125
_ARRAY_BUFFER, _ELEMENT_ARRAY_BUFFER = 34962, 34963
_TRIANGLES = 4


@dataclass(frozen=True)
class Mesh:
    """Triangles: coordinates of vertices (vertices, 3), and the three vertices of each face (faces, 3)."""

    vertices: FloatArray
    faces: npt.NDArray[np.uint32]


@REGISTRY.add("EmptyLatentHunyuan3Dv2")
def empty_latent_hunyuan_3d(_context: NodeContext, resolution: int, batch_size: int) -> NodeResult:
    """Return empty latents of 3D shapes."""
    samples = np.zeros((batch_size, _LATENT_CHANNELS, resolution), dtype=np.float32)
    return NodeResult((Latent(samples, type="hunyuan3dv2"),))


@REGISTRY.add("VAEDecodeHunyuan3D")
def vae_decode_hunyuan_3d(
    _context: NodeContext, samples: Latent, vae: Vae, num_chunks: int, octree_resolution: int
) -> NodeResult:
    """Return voxels (batch, depth, height, width) of a ball, at most 32 a side; the sampling decides its size."""
    side = min(octree_resolution, _FINEST_GRID) + 1
    key = samples.samplings[-1].key if samples.samplings else ""
    radius = seeded(key).uniform(0.5, 0.9)
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    distance = np.sqrt(axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2)
    ball = np.clip((radius - distance) * side, -1, 1).astype(np.float32)
    return NodeResult((np.repeat(ball[np.newaxis], len(samples.samples), axis=0),))


@REGISTRY.add("VoxelToMeshBasic")
def voxel_to_mesh_basic(_context: NodeContext, voxel: FloatArray, threshold: float) -> NodeResult:
    """Return a mesh of each voxel grid: the outer sides of all voxels above the threshold."""
    return NodeResult((tuple(_mesh_of(grid, threshold) for grid in voxel),))


def _mesh_of(grid: FloatArray, threshold: float) -> Mesh:
    """Return the mesh of a grid (depth, height, width) around the origin, with its longest side from -1 to 1."""
    solid = np.pad(grid.transpose(2, 1, 0) > threshold, 1)
    voxels = np.argwhere(solid) - 1
    squares = [_squares(solid, voxels, axis, outwards) for axis in range(3) for outwards in (1, -1)]
    corners = np.concatenate(squares)
    if not len(corners):  # one triangle without extent, as in ComfyUI: a mesh must not be empty
        return Mesh(np.zeros((1, 3), dtype=np.float32), np.zeros((1, 3), dtype=np.uint32))
    first = np.arange(0, len(corners), 4)[:, np.newaxis]
    faces = np.concatenate([first + np.array([0, 1, 2]), first + np.array([0, 2, 3])])
    half = max(grid.shape) / 2
    return Mesh(((corners - half) / half).astype(np.float32), faces.astype(np.uint32))


def _squares(
    solid: npt.NDArray[np.bool_], voxels: npt.NDArray[np.int64], axis: int, outwards: int
) -> npt.NDArray[np.int64]:
    """Return the corners, four per square, of all voxel sides in one direction without a neighbour.

    Args:
        solid: which voxels are filled, (x, y, z), with an empty border of one.
        voxels: coordinates of the filled ones, without the border.
        axis: 0 for x, 1 for y, 2 for z.
        outwards: 1 or -1, the direction along the axis. Corners are anticlockwise, seen from outside.
    """
    step = np.zeros(3, dtype=np.int64)
    step[axis] = outwards
    bare = voxels[~solid[tuple((voxels + 1 + step).T)]]
    square = np.zeros((4, 3), dtype=np.int64)
    square[:, axis] = max(outwards, 0)
    square[:, (axis + 1) % 3] = (0, 1, 1, 0)
    square[:, (axis + 2) % 3] = (0, 0, 1, 1)
    corners: npt.NDArray[np.int64] = bare[:, np.newaxis] + square[::outwards]
    return corners.reshape(-1, 3)


@REGISTRY.add("SaveGLB")
def save_glb(context: NodeContext, mesh: Sequence[Mesh], filename_prefix: str) -> NodeResult:
    """Save GLB files in the output folder."""
    path = output_path(context, filename_prefix)
    saved = []
    for one in mesh:
        file, entry = path.next_file("glb")
        _write_glb(file, one, metadata_texts(context))
        saved.append(entry)
    return NodeResult(ui={"3d": saved})


def _write_glb(file: Path, mesh: Mesh, metadata: dict[str, str]) -> None:
    vertices, faces = mesh.vertices.tobytes(), mesh.faces.tobytes()
    scene = json.dumps(_scene(mesh, len(vertices), len(faces), metadata)).encode()
    scene += b" " * (-len(scene) % 4)
    chunks = struct.pack("<II", len(scene), _CHUNK_JSON) + scene
    chunks += struct.pack("<II", len(vertices) + len(faces), _CHUNK_BINARY) + vertices + faces
    file.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks)


def _scene(mesh: Mesh, vertex_bytes: int, face_bytes: int, metadata: dict[str, str]) -> dict[str, Any]:
    return {
        "asset": {"version": "2.0", "generator": "ComfyUI emulator, no model ran", "extras": metadata},
        "buffers": [{"byteLength": vertex_bytes + face_bytes}],
        "bufferViews": [
            {"buffer": 0, "byteOffset": 0, "byteLength": vertex_bytes, "target": _ARRAY_BUFFER},
            {"buffer": 0, "byteOffset": vertex_bytes, "byteLength": face_bytes, "target": _ELEMENT_ARRAY_BUFFER},
        ],
        "accessors": [
            {
                "bufferView": 0,
                "componentType": _FLOAT,
                "count": len(mesh.vertices),
                "type": "VEC3",
                "min": mesh.vertices.min(axis=0).tolist(),
                "max": mesh.vertices.max(axis=0).tolist(),
            },
            {"bufferView": 1, "componentType": _UNSIGNED_INT, "count": int(mesh.faces.size), "type": "SCALAR"},
        ],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1, "mode": _TRIANGLES}]}],
        "nodes": [{"mesh": 0}],
        "scenes": [{"nodes": [0]}],
        "scene": 0,
    }

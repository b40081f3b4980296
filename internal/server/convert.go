package server

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	agentisov1 "github.com/agentiso/agentiso/api/agentiso/v1"
	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/workspace"
)

var statesOut = map[domain.State]agentisov1.WorkspaceState{
	domain.Creating:   agentisov1.WorkspaceState_WORKSPACE_STATE_CREATING,
	domain.Running:    agentisov1.WorkspaceState_WORKSPACE_STATE_RUNNING,
	domain.Stopping:   agentisov1.WorkspaceState_WORKSPACE_STATE_STOPPING,
	domain.Stopped:    agentisov1.WorkspaceState_WORKSPACE_STATE_STOPPED,
	domain.Starting:   agentisov1.WorkspaceState_WORKSPACE_STATE_STARTING,
	domain.Failed:     agentisov1.WorkspaceState_WORKSPACE_STATE_FAILED,
	domain.Destroying: agentisov1.WorkspaceState_WORKSPACE_STATE_DESTROYING,
}

func workspaceOut(w *domain.Workspace) *agentisov1.Workspace {
	m := &agentisov1.Workspace{
		Id:            w.ID,
		Name:          w.Name,
		State:         statesOut[w.State],
		Reason:        w.Reason,
		CreateTime:    stamp(w.CreatedAt),
		StartTime:     stamp(w.StartedAt),
		Image:         w.Image,
		ImageDigest:   w.ImageDigest,
		Kernel:        w.Kernel,
		Cpus:          uint32(max(w.CPUs, 0)),
		MemoryMib:     w.MemoryMiB,
		DiskBytes:     w.DiskBytes,
		Environment:   w.Env,
		Workdir:       w.Workdir,
		User:          w.User,
		Init:          w.Init,
		Hostname:      w.Hostname,
		Mac:           w.Slot.MAC,
		AllowInternet: w.Policy.AllowInternet,
		MachinePid:    int64(w.Machine.PID),
		Accelerator:   w.Machine.Accel,
		Link:          string(w.Machine.Endpoint.Kind),
		Ephemeral:     w.Ephemeral,
	}
	if w.Slot.Address.IsValid() {
		m.Address = w.Slot.Address.String()
	}
	return m
}

func timingsOut(t workspace.Timings) *agentisov1.Timings {
	m := &agentisov1.Timings{Start: t.Start, TotalNs: int64(t.Total)}
	for _, s := range t.Steps {
		m.Steps = append(m.Steps, &agentisov1.Step{Name: s.Name, DurationNs: int64(s.Duration)})
	}
	return m
}

func imageOut(i domain.Image) *agentisov1.Image {
	return &agentisov1.Image{
		Digest:      i.Digest,
		Names:       i.Names,
		CreateTime:  stamp(i.CreatedAt),
		SizeBytes:   i.SizeBytes,
		UsedBytes:   i.UsedBytes,
		Source:      i.Source,
		User:        i.User,
		Workdir:     i.Workdir,
		Environment: i.Env,
		Entrypoint:  i.Entrypoint,
		Cmd:         i.Cmd,
	}
}

func kernelOut(k domain.Kernel, defaultName string) *agentisov1.Kernel {
	return &agentisov1.Kernel{
		Name:       k.Name,
		Release:    k.Release,
		Digest:     k.Digest,
		Source:     k.Source,
		SizeBytes:  k.SizeBytes,
		IsDefault:  k.Name == defaultName,
		CreateTime: stamp(k.CreatedAt),
	}
}

func verdictOut(v Verdict) agentisov1.Check_Verdict {
	switch v {
	case OK:
		return agentisov1.Check_VERDICT_OK
	case Warn:
		return agentisov1.Check_VERDICT_WARN
	case Fail:
		return agentisov1.Check_VERDICT_FAIL
	}
	return agentisov1.Check_VERDICT_UNSPECIFIED
}

// stamp leaves out what is not set.
func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

package server

import (
	"context"

	"connectrpc.com/connect"

	agentisov1 "github.com/agentiso/agentiso/api/agentiso/v1"
	"github.com/agentiso/agentiso/api/agentiso/v1/agentisov1connect"
	"github.com/agentiso/agentiso/internal/domain"
)

type systemService struct{ s *Server }

var _ agentisov1connect.SystemServiceHandler = (*systemService)(nil)

func (h *systemService) Info(ctx context.Context, _ *connect.Request[agentisov1.InfoRequest]) (*connect.Response[agentisov1.InfoResponse], error) {
	i, err := h.s.o.System.Info(ctx)
	if err != nil {
		return nil, err
	}
	all, err := h.s.o.Workspaces.List(ctx)
	if err != nil {
		return nil, err
	}
	running := 0
	for _, w := range all {
		if w.State == domain.Running {
			running++
		}
	}
	return connect.NewResponse(&agentisov1.InfoResponse{
		Version:           i.Version,
		Pid:               int64(i.PID),
		StartTime:         stamp(i.StartedAt),
		DataDir:           i.DataDir,
		RunDir:            i.RunDir,
		ConfigFile:        i.ConfigFile,
		StorageDriver:     i.StorageDriver,
		NetworkDriver:     i.NetworkDriver,
		QemuVersion:       i.QEMUVersion,
		Accelerator:       i.Accelerator,
		DefaultImage:      i.DefaultImage,
		DefaultKernel:     i.DefaultKernel,
		MaxWorkspaces:     uint32(max(i.MaxWorkspaces, 0)),
		WorkspacesTotal:   uint32(len(all)),
		WorkspacesRunning: uint32(running),
	}), nil
}

func (h *systemService) Doctor(ctx context.Context, req *connect.Request[agentisov1.DoctorRequest]) (*connect.Response[agentisov1.DoctorResponse], error) {
	checks, err := h.s.o.System.Doctor(ctx, req.Msg.GetProbe())
	if err != nil {
		return nil, err
	}
	res := &agentisov1.DoctorResponse{}
	for _, c := range checks {
		res.Checks = append(res.Checks, &agentisov1.Check{Name: c.Name, Verdict: verdictOut(c.Verdict), Detail: c.Detail, Next: c.Next})
	}
	return connect.NewResponse(res), nil
}

func (h *systemService) Shutdown(_ context.Context, req *connect.Request[agentisov1.ShutdownRequest]) (*connect.Response[agentisov1.ShutdownResponse], error) {
	h.s.o.System.Shutdown(req.Msg.GetStopMachines())
	return connect.NewResponse(&agentisov1.ShutdownResponse{}), nil
}

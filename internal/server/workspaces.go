package server

import (
	"context"
	"time"

	"connectrpc.com/connect"

	agentisov1 "github.com/agentiso/agentiso/api/agentiso/v1"
	"github.com/agentiso/agentiso/api/agentiso/v1/agentisov1connect"
	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/workspace"
)

type workspaceService struct{ s *Server }

var _ agentisov1connect.WorkspaceServiceHandler = (*workspaceService)(nil)

func (h *workspaceService) Create(ctx context.Context, req *connect.Request[agentisov1.CreateRequest]) (*connect.Response[agentisov1.CreateResponse], error) {
	w, t, err := h.create(ctx, req.Msg, false)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&agentisov1.CreateResponse{Workspace: workspaceOut(w), Timings: timingsOut(t)}), nil
}

func (h *workspaceService) create(ctx context.Context, m *agentisov1.CreateRequest, ephemeral bool) (*domain.Workspace, workspace.Timings, error) {
	if m.GetMemoryMib() < 0 || m.GetDiskBytes() < 0 {
		return nil, workspace.Timings{}, fault.New(fault.Invalid, "memory and disk sizes cannot be negative").
			WithNext("Give a positive size, or none for the default.")
	}
	return h.s.o.Workspaces.Create(ctx, workspace.CreateOptions{
		Name:      m.GetName(),
		Image:     m.GetImage(),
		Kernel:    m.GetKernel(),
		Init:      m.GetInit(),
		CPUs:      int(m.GetCpus()),
		MemoryMiB: m.GetMemoryMib(),
		DiskBytes: m.GetDiskBytes(),
		Env:       m.GetEnvironment(),
		Workdir:   m.GetWorkdir(),
		User:      m.GetUser(),
		Policy:    domain.NetworkPolicy{AllowInternet: m.GetAllowInternet()},
		Ephemeral: ephemeral,
	})
}

// releaseLimit bounds the destruction of a held workspace.
const releaseLimit = 30 * time.Second

// Hold creates, answers, and destroys when the call ends for whatever reason.
func (h *workspaceService) Hold(ctx context.Context, req *connect.Request[agentisov1.HoldRequest], stream *connect.ServerStream[agentisov1.HoldResponse]) error {
	if req.Msg.GetCreate() == nil {
		return fault.New(fault.Invalid, "hold: the field create is missing").WithNext("Say what to create.")
	}
	w, t, err := h.create(ctx, req.Msg.GetCreate(), true)
	if err != nil {
		return err
	}
	callOf(ctx).ref = w.ID
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseLimit)
		defer cancel()
		if _, err := h.s.o.Workspaces.Destroy(ctx, w.ID); err != nil && !fault.Is(err, fault.NotFound) {
			h.s.o.Log.Error("destroy a held workspace", "workspace", w.ID, "op", "release", "err", err)
		}
	}()
	if err := stream.Send(&agentisov1.HoldResponse{Workspace: workspaceOut(w), Timings: timingsOut(t)}); err != nil {
		return err
	}
	<-ctx.Done()
	return context.Cause(ctx)
}

func (h *workspaceService) Get(ctx context.Context, req *connect.Request[agentisov1.GetRequest]) (*connect.Response[agentisov1.GetResponse], error) {
	w, err := h.s.o.Workspaces.Get(ctx, req.Msg.GetRef())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&agentisov1.GetResponse{Workspace: h.withUsage(ctx, w)}), nil
}

// withUsage adds what the disk's layer holds; that it cannot be told is no
// reason to withhold the rest.
func (h *workspaceService) withUsage(ctx context.Context, w *domain.Workspace) *agentisov1.Workspace {
	m := workspaceOut(w)
	if n, err := h.s.o.Workspaces.DiskUsedBytes(ctx, w.ID); err == nil {
		m.DiskUsedBytes = n
	}
	return m
}

func (h *workspaceService) List(ctx context.Context, _ *connect.Request[agentisov1.ListRequest]) (*connect.Response[agentisov1.ListResponse], error) {
	all, err := h.s.o.Workspaces.List(ctx)
	if err != nil {
		return nil, err
	}
	res := &agentisov1.ListResponse{}
	for _, w := range all {
		res.Workspaces = append(res.Workspaces, h.withUsage(ctx, w))
	}
	return connect.NewResponse(res), nil
}

func (h *workspaceService) Stop(ctx context.Context, req *connect.Request[agentisov1.StopRequest]) (*connect.Response[agentisov1.StopResponse], error) {
	w, err := h.s.o.Workspaces.Stop(ctx, req.Msg.GetRef(), req.Msg.GetForce())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&agentisov1.StopResponse{Workspace: h.withUsage(ctx, w)}), nil
}

func (h *workspaceService) Start(ctx context.Context, req *connect.Request[agentisov1.StartRequest]) (*connect.Response[agentisov1.StartResponse], error) {
	w, t, err := h.s.o.Workspaces.Start(ctx, req.Msg.GetRef())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&agentisov1.StartResponse{Workspace: h.withUsage(ctx, w), Timings: timingsOut(t)}), nil
}

func (h *workspaceService) Destroy(ctx context.Context, req *connect.Request[agentisov1.DestroyRequest]) (*connect.Response[agentisov1.DestroyResponse], error) {
	id, err := h.s.o.Workspaces.Destroy(ctx, req.Msg.GetRef())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&agentisov1.DestroyResponse{Id: id}), nil
}

func (h *workspaceService) Rename(ctx context.Context, req *connect.Request[agentisov1.RenameRequest]) (*connect.Response[agentisov1.RenameResponse], error) {
	w, err := h.s.o.Workspaces.Rename(ctx, req.Msg.GetRef(), req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&agentisov1.RenameResponse{Workspace: h.withUsage(ctx, w)}), nil
}

// logChunk keeps messages well below what any client accepts.
const logChunk = 64 << 10

func (h *workspaceService) Logs(ctx context.Context, req *connect.Request[agentisov1.LogsRequest], stream *connect.ServerStream[agentisov1.LogsResponse]) error {
	m := req.Msg
	callOf(ctx).ref = m.GetRef()
	if m.GetTailBytes() < 0 {
		return fault.New(fault.Invalid, "the number of bytes to begin with cannot be negative").WithNext("Give 0 for all that is kept.")
	}
	return h.s.o.Workspaces.Logs(ctx, m.GetRef(), m.GetFollow(), m.GetTailBytes(), func(p []byte) error {
		for len(p) > 0 {
			n := min(len(p), logChunk)
			if err := stream.Send(&agentisov1.LogsResponse{Data: p[:n]}); err != nil {
				return err
			}
			p = p[n:]
		}
		return nil
	})
}

func (h *workspaceService) Stats(ctx context.Context, req *connect.Request[agentisov1.StatsRequest]) (*connect.Response[agentisov1.StatsResponse], error) {
	st, err := h.s.o.Workspaces.Stats(ctx, req.Msg.GetRef())
	if err != nil {
		return nil, err
	}
	g := st.Guest
	return connect.NewResponse(&agentisov1.StatsResponse{
		UptimeNs:         g.GetUptimeNs(),
		CpuUsedPercent:   g.GetCpuUsedPercent(),
		MemoryTotalBytes: g.GetMemoryTotalBytes(),
		MemoryUsedBytes:  g.GetMemoryUsedBytes(),
		DiskTotalBytes:   g.GetDiskTotalBytes(),
		DiskUsedBytes:    g.GetDiskUsedBytes(),
		Processes:        g.GetProcesses(),
		AgentRssBytes:    g.GetAgentRssBytes(),
		MachinePssBytes:  pssBytes(st.Machine),
		BootNs:           int64(st.Boot),
	}), nil
}

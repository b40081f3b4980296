package server

import (
	"context"

	"connectrpc.com/connect"

	agentisov1 "github.com/agentiso/agentiso/api/agentiso/v1"
	"github.com/agentiso/agentiso/api/agentiso/v1/agentisov1connect"
)

type kernelService struct{ s *Server }

var _ agentisov1connect.KernelServiceHandler = (*kernelService)(nil)

func (h *kernelService) Build(ctx context.Context, req *connect.Request[agentisov1.BuildKernelRequest], stream *connect.ServerStream[agentisov1.BuildKernelResponse]) error {
	p, stop := relay(func(p *agentisov1.Progress) error {
		return stream.Send(&agentisov1.BuildKernelResponse{Event: &agentisov1.BuildKernelResponse_Progress{Progress: p}})
	})
	defer stop()
	k, err := h.s.o.Kernels.BuildLean(ctx, int(req.Msg.GetJobs()), req.Msg.GetForce(), p)
	if err != nil {
		return err
	}
	stop()
	return stream.Send(&agentisov1.BuildKernelResponse{Event: &agentisov1.BuildKernelResponse_Kernel{Kernel: kernelOut(k, h.defaultName(ctx))}})
}

func (h *kernelService) Fetch(ctx context.Context, req *connect.Request[agentisov1.FetchKernelRequest], stream *connect.ServerStream[agentisov1.FetchKernelResponse]) error {
	p, stop := relay(func(p *agentisov1.Progress) error {
		return stream.Send(&agentisov1.FetchKernelResponse{Event: &agentisov1.FetchKernelResponse_Progress{Progress: p}})
	})
	defer stop()
	k, err := h.s.o.Kernels.Fetch(ctx, req.Msg.GetForce(), p)
	if err != nil {
		return err
	}
	stop()
	return stream.Send(&agentisov1.FetchKernelResponse{Event: &agentisov1.FetchKernelResponse_Kernel{Kernel: kernelOut(k, h.defaultName(ctx))}})
}

// defaultName is empty when there is no default to tell.
func (h *kernelService) defaultName(ctx context.Context) string {
	_, name, err := h.s.o.Kernels.Kernels(ctx)
	if err != nil {
		return ""
	}
	return name
}

func (h *kernelService) List(ctx context.Context, _ *connect.Request[agentisov1.ListKernelsRequest]) (*connect.Response[agentisov1.ListKernelsResponse], error) {
	all, def, err := h.s.o.Kernels.Kernels(ctx)
	if err != nil {
		return nil, err
	}
	res := &agentisov1.ListKernelsResponse{}
	for _, k := range all {
		res.Kernels = append(res.Kernels, kernelOut(k, def))
	}
	return connect.NewResponse(res), nil
}

package server

import (
	"context"
	"net/http"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"

	agentisov1 "github.com/agentiso/agentiso/api/agentiso/v1"
	"github.com/agentiso/agentiso/api/agentiso/v1/agentisov1connect"
	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

type imageService struct{ s *Server }

var _ agentisov1connect.ImageServiceHandler = (*imageService)(nil)

func (h *imageService) Build(ctx context.Context, req *connect.Request[agentisov1.BuildImageRequest], stream *connect.ServerStream[agentisov1.BuildImageResponse]) error {
	m := req.Msg
	p, stop := relay(func(p *agentisov1.Progress) error {
		return stream.Send(&agentisov1.BuildImageResponse{Event: &agentisov1.BuildImageResponse_Progress{Progress: p}})
	})
	defer stop()
	image, err := h.s.o.Images.Build(ctx, m.GetRecipe(), m.GetName(), m.GetForce(), p)
	if err != nil {
		return err
	}
	stop()
	return stream.Send(&agentisov1.BuildImageResponse{Event: &agentisov1.BuildImageResponse_Image{Image: imageOut(image)}})
}

func (h *imageService) Pull(ctx context.Context, req *connect.Request[agentisov1.PullImageRequest], stream *connect.ServerStream[agentisov1.PullImageResponse]) error {
	m := req.Msg
	p, stop := relay(func(p *agentisov1.Progress) error {
		return stream.Send(&agentisov1.PullImageResponse{Event: &agentisov1.PullImageResponse_Progress{Progress: p}})
	})
	defer stop()
	image, err := h.s.o.Images.Pull(ctx, domain.PullOptions{
		Reference: m.GetReference(),
		Name:      m.GetName(),
		Insecure:  m.GetInsecure(),
		Auth: domain.RegistryAuth{
			Username:      m.GetAuth().GetUsername(),
			Password:      m.GetAuth().GetPassword(),
			IdentityToken: m.GetAuth().GetIdentityToken(),
			RegistryToken: m.GetAuth().GetRegistryToken(),
		},
	}, p)
	if err != nil {
		return err
	}
	stop()
	return stream.Send(&agentisov1.PullImageResponse{Event: &agentisov1.PullImageResponse_Image{Image: imageOut(image)}})
}

func (h *imageService) List(ctx context.Context, _ *connect.Request[agentisov1.ListImagesRequest]) (*connect.Response[agentisov1.ListImagesResponse], error) {
	all, err := h.s.o.Images.Images(ctx)
	if err != nil {
		return nil, err
	}
	res := &agentisov1.ListImagesResponse{}
	for _, i := range all {
		res.Images = append(res.Images, imageOut(i))
	}
	return connect.NewResponse(res), nil
}

func (h *imageService) Get(ctx context.Context, req *connect.Request[agentisov1.GetImageRequest]) (*connect.Response[agentisov1.GetImageResponse], error) {
	i, err := h.s.o.Images.Image(ctx, req.Msg.GetRef())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&agentisov1.GetImageResponse{Image: imageOut(i), UsedBy: h.s.o.Workspaces.UsersOf(i.Digest)}), nil
}

func (h *imageService) Remove(ctx context.Context, req *connect.Request[agentisov1.RemoveImageRequest]) (*connect.Response[agentisov1.RemoveImageResponse], error) {
	digest, removed, err := h.s.o.Images.Remove(ctx, req.Msg.GetRef(), h.s.o.Workspaces.UsersOf)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&agentisov1.RemoveImageResponse{Digest: digest, DiskRemoved: removed}), nil
}

// importImage makes an image of the tar stream in the body. The body is read
// as fast as it is written to disk, never ahead of it.
func (s *Server) importImage(w http.ResponseWriter, r *http.Request) {
	name := r.URL.Query().Get("name")
	if name == "" {
		s.writeError(w, r, fault.New(fault.Invalid, "the image to import has no name").WithNext("Add ?name=NAME to the address."))
		return
	}
	body := newUpload(w, r)
	defer body.Close()
	image, err := s.o.Images.Import(r.Context(), name, body, nil)
	if err != nil {
		s.writeError(w, r, err)
		return
	}
	answer, err := protojson.Marshal(imageOut(image))
	if err != nil {
		s.writeError(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(append(answer, '\n')) // nobody to tell
}
